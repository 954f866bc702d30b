"""Tune's parts of a sweep: what it is asked to try, in which order, and whom it stops."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.utils import flatten_dict

from jobs.sweep import tuning
from jobs.sweep.broker import PEERS, RUNG
from jobs.sweep.configs import CONFIG, config_of
from orchestrator.spec.job import JobSpec
from orchestrator.spec.sweep import SweepSpec, configs

SPACE = {"learning_rate": {"grid": [1e-4, 1e-3]}, "epochs": {"grid": [1, 2, 3]}}


def job(**sweep: Any) -> JobSpec:
    spec = {"name": "one", "base_model": "m", "data": {"train": "t.jsonl"}}
    return JobSpec.model_validate(spec | {"sweep": {"search": SPACE} | sweep})


def test_a_listed_search_is_what_the_dry_run_shows_with_sisters_side_by_side() -> None:
    asked = job(searcher="random", seed=3)
    space, _, samples = tuning.search(asked, 16)
    tried = space[CONFIG]["grid_search"]
    assert samples == 1
    assert sorted(map(str, tried)) == sorted(map(str, configs(asked) or []))
    assert [config["train.epochs"] for config in tried] == [3, 1, 3, 1, 2, 2]
    assert len({config["train.learning_rate"] for config in tried[:2]}) == 1


def test_of_as_many_trunks_as_can_be_under_way_the_longest_and_the_shortest_come_first() -> None:
    listed = [{"train.learning_rate": rate, "train.epochs": n} for rate in (1, 2, 3) for n in (1, 2, 3, 4)]
    tried = [(c["train.learning_rate"], c["train.epochs"]) for c in tuning.by_trunk(listed, at_once=4)]
    assert tried == [(1, 4), (1, 1), (2, 4), (2, 1), (1, 3), (1, 2), (2, 3), (2, 2), (3, 4), (3, 1), (3, 3), (3, 2)]
    alone = [{"train.learning_rate": rate} for rate in (1, 2, 3)]
    assert tuning.by_trunk(alone, at_once=1) == alone


def test_optuna_begins_with_what_is_good_most_often_and_gives_back_lists() -> None:
    search = {
        "learning_rate": {"loguniform": [1e-5, 3e-3]},
        "rank": {"randint": [4, 5]},
        "targets": {"choice": [["q_proj"], ["q_proj", "v_proj"]]},
    }
    asked = job(search=search, searcher="optuna", trials=6, seed=1)
    space, searcher, samples = tuning.search(asked, 16)
    searcher.set_search_properties("validation_loss", "min", space)  # type: ignore[union-attr]  # as Tune does
    assert samples == 6
    drawn = [config_of(searcher.suggest(f"t{number}")) for number in range(6)]  # type: ignore[union-attr]
    assert [one["train.learning_rate"] for one in drawn[:2]] == [3e-4, 1e-3]
    assert all(1e-5 <= one["train.learning_rate"] <= 3e-3 for one in drawn)
    assert {one["tuning.rank"] for one in drawn} <= {4, 5}
    assert all(one["tuning.targets"] in search["targets"]["choice"] for one in drawn)  # type: ignore[operator]


def test_optuna_learns_a_metric_that_only_a_last_report_has() -> None:
    search = {"learning_rate": {"loguniform": [1e-5, 3e-3]}}
    spec = job().model_dump() | {"evaluate": {"metrics": ["entity_f1"]}, "data": {"train": "t", "test": "u"}}
    spec["sweep"] = {"search": search, "searcher": "optuna", "metric": "entity_f1", "trials": 4}
    space, limited, _ = tuning.search(JobSpec.model_validate(spec), 16)
    searcher = limited.searcher  # type: ignore[union-attr]
    searcher.set_search_properties(None, None, space)
    for trial, last in (("good", {"metrics": {"entity_f1": 0.7}}), ("stopped", {})):
        searcher.suggest(trial)
        searcher.on_trial_result(trial, flatten_dict({"validation_loss": 1.0, "training_iteration": 1}))  # as Tune does
        searcher.on_trial_complete(trial, flatten_dict({"validation_loss": 0.5, "training_iteration": 2} | last))
    found = searcher._ot_study.get_trials()
    assert [(one.value, one.state.name) for one in found] == [(0.7, "COMPLETE"), (None, "PRUNED")]
    assert searcher._ot_study.direction.name == "MAXIMIZE"


@pytest.fixture
def asha() -> Any:
    """Two trials have done one epoch each, well and badly."""
    made = tuning.scheduler(SweepSpec.model_validate({"search": SPACE, "reduction_factor": 2}), 3.0)
    made.set_search_properties("validation_loss", "min")
    return made


def decide(scheduler: Any, trial: str, loss: float, rung: float | None, peers: dict[str, float] | None = None) -> str:
    one = SimpleNamespace(trial_id=trial)
    scheduler.on_trial_add(None, one)
    result = {"validation_loss": loss} | (
        {} if rung is None else {RUNG: rung, PEERS: [list(peer) for peer in (peers or {}).items()]}
    )
    return scheduler.on_trial_result(None, one, flatten_dict(result))  # as Tune does


def test_the_worse_half_is_stopped_at_the_end_of_an_epoch(asha: Any) -> None:
    assert decide(asha, "good", 1.0, 1.0) == TrialScheduler.CONTINUE
    assert decide(asha, "bad", 2.0, 1.0) == TrialScheduler.STOP
    assert decide(asha, "better", 0.9, 1.0) == TrialScheduler.CONTINUE


def test_who_is_stopped_of_those_that_come_together_is_not_decided_by_who_is_heard_first() -> None:
    losses = {f"t{number}": float(number) for number in range(1, 9)}
    for order in itertools.islice(itertools.permutations(losses), 0, None, 1009):
        made = tuning.scheduler(SweepSpec.model_validate({"search": SPACE}), 3.0)
        on = {trial for trial in order if decide(made, trial, losses[trial], 1.0, losses) == TrialScheduler.CONTINUE}
        assert on == {"t1", "t2", "t3", "t4"}, f"the better half goes on, heard in the order {order}"


def test_one_that_comes_later_is_compared_with_those_that_came_together_once_each(asha: Any) -> None:
    losses = {"t1": 1.0, "t2": 2.0, "t3": 3.0, "t4": 4.0}
    for trial, loss in losses.items():
        decide(asha, trial, loss, 1.0, losses)
    assert decide(asha, "late and in the better half", 2.4, 1.0) == TrialScheduler.CONTINUE
    assert decide(asha, "late and in the worse half", 2.6, 1.0) == TrialScheduler.STOP


def test_a_finished_short_schedule_is_compared_with_nobody(asha: Any) -> None:
    assert decide(asha, "short and finished", 0.1, None) == TrialScheduler.CONTINUE
    assert decide(asha, "long", 1.0, 1.0) == TrialScheduler.CONTINUE, "it has nobody above it at its rung"
    assert decide(asha, "finished badly", 9.0, None) == TrialScheduler.CONTINUE


def test_a_budget_is_spent_by_seconds_or_by_tokens() -> None:
    seconds, tokens = [0.0], [0]
    sweep = SweepSpec.model_validate({"search": SPACE, "budget": {"seconds": 60, "tokens": 1000}})
    budget = tuning.Budget(sweep, lambda: seconds[0], lambda: tokens[0])
    assert budget.spent is None
    seconds[0] = 60.0
    assert budget.spent == "60 seconds"
    seconds[0], tokens[0] = 0.0, 1000
    assert budget.spent == "1,000 tokens"
    assert tuning.Budget(SweepSpec.model_validate({"search": SPACE}), lambda: 1e9, lambda: 10**9).spent is None
