"""Sweeps on a real Ray: Tune's trials are processes, the group is Ray Train's, and both are really killed. About six minutes.

Each sweep is `python -m jobs.sweep` in a process of its own, on a tiny model in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.registry.adapters import read_provenance
from orchestrator.runs.result import SweepResult
from orchestrator.runs.states import RunState, TrialState
from orchestrator.store import adapter_path, control_path, stop_trials_path
from tests.integration.sweep_process import EVALUATE, kill, solo, trials, values

pytestmark = [pytest.mark.slow, pytest.mark.ray]

TRUNKS = {
    "search": {"learning_rate": {"grid": [2e-3, 5e-3]}, "epochs": {"grid": [1, 2]}},
    "searcher": "grid",
    "scheduler": "none",
}
LONG = TRUNKS | {"search": {"learning_rate": {"grid": [2e-3, 5e-3]}, "epochs": {"grid": [1, 40]}}}
WSD = {"schedule": "warmup_stable_decay", "decay": 0.25, "warmup": 0.1}
STEADY = WSD | {"warmup": 0}

_CALM: list[SweepResult] = []


@pytest.fixture
def calm(make_job: Any, start: Any) -> Callable[[], SweepResult]:
    """What `LONG` comes to when nothing disturbs it: found once, by the first test that asks."""

    def found() -> SweepResult:
        if not _CALM:
            _CALM.append(trials(start(make_job(name="calm", sweep=LONG, train=STEADY)).end()))
        return _CALM[0]

    return found


def test_every_trial_is_its_own_run_and_the_best_wins(make_job: Any, start: Any) -> None:
    job = make_job(sweep=TRUNKS, train=WSD)
    running = start(job)
    result = running.end()
    sweep = trials(result)
    assert [one.state for one in sweep.trials] == [TrialState.FINISHED] * 4
    tried = {(one.config["train.learning_rate"], one.config["train.epochs"]) for one in sweep.trials}
    assert tried == {(rate, epochs) for rate in (2e-3, 5e-3) for epochs in (1, 2)}
    alone = {one.name: solo(make_job, job, one).metrics for one in sweep.trials}
    for one in sweep.trials:
        assert one.metrics["validation_loss"] == pytest.approx(alone[one.name]["validation_loss"], rel=1e-4)
        assert one.steps == alone[one.name]["steps"]
    assert sweep.best == min(alone, key=lambda name: alone[name]["validation_loss"])
    assert sweep.winner is not None
    assert result.metrics["validation_loss"] == sweep.winner.metrics["validation_loss"]
    assert result.adapter is not None
    assert job.store.manifest(adapter_path(result.adapter)) is not None
    made = read_provenance(job.store, result.adapter)
    assert made.sweep is not None
    assert (made.sweep.trial, made.sweep.config, made.sweep.trials) == (
        sweep.best,
        sweep.winner.config,
        {"finished": 4},
    )
    assert made.sweep.value == sweep.winner.metrics["validation_loss"]
    assert made.sweep.search["train.epochs"] == {"grid": [1, 2]}
    assert made.spec["spec"]["train"]["learning_rate"] == sweep.winner.config["train.learning_rate"]
    assert made.metrics["tokens"] == sweep.winner.tokens > 0
    assert sweep.compute.steps == 2 * (6 + 1 + 2) - 1, (
        "a trunk to the second decay, and two decays, for each learning rate; they share the first gradient"
    )
    assert sweep.compute.separate_steps == sum(one.steps for one in sweep.trials) == 24
    said = running.events("trial")
    assert {event.data["trial"] for event in said} == {"t01", "t02", "t03", "t04"}
    assert [event.data["best"] for event in running.events("sweep") if "best" in event.data][-1] == sweep.best


def test_two_workers_share_a_group(make_job: Any, start: Any) -> None:
    """Over gloo, with a batch of three rows that leaves them unequal shares."""
    more = {"train": WSD | {"batch_size": 3}, "sweep": TRUNKS}
    one = trials(start(make_job(name="one", **more)).end())
    two = trials(start(make_job(resources={"workers": 2, "cpus_per_worker": 1}, **more)).end())
    assert values(two) == pytest.approx(values(one), rel=1e-4)
    assert (two.best, two.compute.steps) == (one.best, one.compute.steps)


def test_a_killed_group_and_a_killed_trial_change_nothing(make_job: Any, start: Any, calm: Any) -> None:
    """kill -9 of the worker that trains, after its first reports, and of one trial's process."""
    job = make_job(sweep=LONG, train=STEADY, resources={"max_failures": 2})
    undisturbed = calm()
    running = start(job)
    running.until(lambda: [e for e in running.events("trial") if "validation_loss" in e.data])
    kill("RayTrainWorker")
    kill("ThinTrial", "ResourceTrainable")  # Tune wraps the class
    sweep = trials(running.end())
    assert values(sweep) == pytest.approx(values(undisturbed), rel=1e-5)
    assert sweep.best == undisturbed.best


def test_a_killed_broker_is_asked_again(make_job: Any, start: Any, calm: Any) -> None:
    undisturbed = calm()
    running = start(make_job(sweep=LONG, train=STEADY))
    running.until(lambda: [e for e in running.events("trial") if "validation_loss" in e.data])
    kill("Broker")
    sweep = trials(running.end())
    assert values(sweep) == pytest.approx(values(undisturbed), rel=1e-5)
    assert sweep.compute.steps < undisturbed.compute.steps + 40, "none of the long ones was begun anew"


def test_a_killed_driver_is_taken_up_where_it_was(make_job: Any, start: Any, calm: Any) -> None:
    job = make_job(sweep=LONG, train=STEADY)
    undisturbed = calm()
    running = start(job)
    running.until(lambda: [e for e in running.events("trial") if e.data["state"] == "finished"])
    time.sleep(6)  # Tune keeps its state every five seconds
    running.process.kill()
    running.process.wait()
    sweep = trials(start(job, attempt=2).end())
    assert values(sweep) == pytest.approx(values(undisturbed), rel=1e-5)
    assert sweep.best == undisturbed.best


def test_one_diverges_one_is_stopped_by_a_person_and_the_third_wins(make_job: Any, start: Any) -> None:
    space = {"search": {"learning_rate": {"grid": [5e-3, 6e-3, 90.0]}}, "searcher": "grid", "scheduler": "none"}
    job = make_job(sweep=space, train={"max_grad_norm": None, "epochs": 60})
    running = start(job)
    under_way = running.until(
        lambda: [
            e for e in running.events("trial") if e.data["config"]["train.learning_rate"] == 6e-3 and "step" in e.data
        ]
    )
    unwanted = under_way[0].data["trial"]
    job.store.write_json(stop_trials_path(job.resolved.run), {"stop_trials": [unwanted]})
    sweep = trials(running.end())
    by_rate = {one.config["train.learning_rate"]: one for one in sweep.trials}
    assert {rate: one.state for rate, one in by_rate.items()} == {
        5e-3: TrialState.FINISHED,
        6e-3: TrialState.STOPPED,
        90.0: TrialState.DIVERGED,
    }
    assert by_rate[6e-3].message == "stopped by a person"
    assert by_rate[6e-3].steps < by_rate[5e-3].steps == 240
    assert "diverged at step" in by_rate[90.0].message
    assert sweep.winner is by_rate[5e-3]


def test_a_budget_that_is_spent_ends_what_is_under_way(make_job: Any, start: Any) -> None:
    space = {"search": {"learning_rate": {"grid": [5e-3, 6e-3]}}, "scheduler": "none", "budget": {"tokens": 1000}}
    running = start(make_job(sweep=space, train={"epochs": 400}))
    result = running.end()
    assert result.state is RunState.FAILED
    assert result.error is not None
    assert result.error["message"] == "No trial came to its end: 2 stopped."
    last = {event.data["trial"]: event.message for event in running.events("trial")}
    assert set(last.values()) == {"the budget of 1,000 tokens is spent"}


def test_one_that_does_not_fit_the_model_fails_alone(make_job: Any, start: Any) -> None:
    search = {"targets": {"choice": [["q_proj"], ["nowhere"]]}}
    sweep = trials(start(make_job(sweep={"search": search, "scheduler": "none"})).end())
    by_targets = {one.config["tuning.targets"][0]: one for one in sweep.trials}
    assert by_targets["q_proj"].state is TrialState.FINISHED
    assert by_targets["nowhere"].state is TrialState.FAILED
    assert "nowhere" in by_targets["nowhere"].message
    assert sweep.winner is by_targets["q_proj"]


def test_all_diverge(make_job: Any, start: Any) -> None:
    search = {"search": {"learning_rate": {"grid": [80.0, 90.0]}}, "searcher": "grid"}
    result = start(make_job(sweep=search, train={"max_grad_norm": None, "epochs": 20})).end()
    assert result.state is RunState.FAILED
    assert result.error is not None
    assert result.error["message"] == "All 2 trials diverged, at learning rates from 80 to 90."


def test_the_best_answers_win(by_answers: Any, start: Any) -> None:
    space = {"search": {"epochs": {"grid": [20, 40, 60]}}, "searcher": "grid", "scheduler": "none"}
    running = start(by_answers(space | {"metric": "entity_f1"}))
    result = running.end()
    sweep = trials(result)
    f1 = {one.name: one.metrics["entity_f1"] for one in sweep.trials}
    assert sweep.best == max(f1, key=lambda name: f1[name])
    assert f1[sweep.best] > min(f1.values()) == 0.0, "sixty steps are enough and twenty are not"
    assert result.evaluation is not None
    assert sweep.winner is not None
    measured = {name: sweep.winner.metrics[name] for name in EVALUATE["metrics"]}
    assert measured == result.evaluation.after, "the rows are the same here"
    finished = [event.data for event in running.events("trial") if event.data["state"] == "finished"]
    assert {data["trial"]: data["metrics"]["entity_f1"] for data in finished} == f1
    assert [event.data["metric"] for event in running.events("sweep") if "best" in event.data][-1] == f1[sweep.best]
    assert result.seconds["evaluating"] > 0


def test_optuna_goes_by_answers_and_a_killed_group_loses_none(by_answers: Any, start: Any) -> None:
    """Epochs are not searched by halves: trials finish apart, and those after the kill are measured by another process."""
    space = {"search": {"epochs": {"randint": [20, 70]}}, "searcher": "optuna", "trials": 5}
    running = start(by_answers(space | {"metric": "exact_match", "scheduler": "none"}, resources={"max_failures": 2}))
    running.until(lambda: [e for e in running.events("trial") if e.data["state"] == "finished"])
    kill("RayTrainWorker")
    sweep = trials(running.end())
    assert [one.state for one in sweep.trials] == [TrialState.FINISHED] * 5
    matched = [one.metrics["exact_match"] for one in sweep.trials]
    assert sweep.winner is not None
    assert sweep.winner.metrics["exact_match"] == max(matched) > 0


def test_a_sweep_that_was_paused_and_then_killed_repeats_nothing_that_was_measured(by_answers: Any, start: Any) -> None:
    """It is paused when one trial has been measured and the other still trains; then its driver is killed."""
    space = {"search": {"epochs": {"grid": [20, 160]}}, "searcher": "grid", "scheduler": "none", "metric": "entity_f1"}
    job = by_answers(space)
    first = start(job)
    (known,) = first.until(lambda: [e.data for e in first.events("trial") if e.data["state"] == "finished"])
    job.store.write_json(control_path(job.resolved.run, 1), {"action": "pause"})
    assert first.end().state is RunState.PAUSED
    second = start(job, attempt=2)
    second.until(lambda: [e for e in second.events("trial") if e.id.startswith("a2-") and e.data.get("step", 0) > 20])
    second.process.kill()
    second.process.wait()
    third = start(job, attempt=3)
    result = third.end()
    sweep = trials(result)
    by_epochs = {one.config["train.epochs"]: one for one in sweep.trials}
    assert [one.state for one in sweep.trials] == [TrialState.FINISHED] * 2
    assert by_epochs[20].name == known["trial"]
    assert by_epochs[20].metrics["entity_f1"] == known["metrics"]["entity_f1"] == 0.0
    assert sweep.winner is by_epochs[160]
    assert result.evaluation is not None
    assert result.evaluation.after["entity_f1"] == by_epochs[160].metrics["entity_f1"] > 0
    trained = [e for e in third.events("trial") if e.id[:3] in ("a2-", "a3-") and e.data["state"] == "running"]
    assert {e.id[:3] for e in trained} == {"a2-", "a3-"}
    assert {e.data["trial"] for e in trained} == {by_epochs[160].name}


def test_no_row_to_choose_by_is_said_before_anything_is_trained(make_job: Any, start: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "words"}\n' * 4, encoding="utf-8")
    job = make_job()
    data = job.resolved.spec.data.model_dump() | {"validation": str(rows)}
    result = start(make_job(name="none", data=data, sweep=TRUNKS | {"metric": "exact_match"}, evaluate=EVALUATE)).end()
    assert result.state is RunState.FAILED
    assert result.error is not None
    assert "none of them has a question and an answer" in result.error["message"]


def test_who_is_worse_at_a_rung_takes_no_step_more(make_job: Any, start: Any) -> None:
    rates = [5e-3, 3e-6, 2e-6, 1e-6]
    search = {"learning_rate": {"grid": rates}, "epochs": {"grid": [4]}}
    sweep = trials(start(make_job(sweep={"search": search, "searcher": "grid"}, train=WSD)).end())
    stopped = [one for one in sweep.trials if one.state is TrialState.STOPPED]
    assert sorted(one.epochs for one in stopped) == [1.0, 1.0, 2.0], "half of four, and half of those"
    assert sweep.winner is not None
    assert sweep.winner.config["train.learning_rate"] == rates[0]
    shared = len(rates) - 1  # the first gradient, but for one of them
    assert sweep.compute.steps == sum(one.steps for one in sweep.trials) - shared
