"""What a person writes of a sweep, what is refused and how that is said, and the trials that come of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from orchestrator.errors import SpecError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.loading import parse_spec
from orchestrator.spec.sweep import configs, suggested, total_steps, trial_name, trial_spec, trunk_warmup

BASE = "name: a\nbase_model: m\ndata:\n  train: x.jsonl\n"
EPOCHS = "search: {epochs: {choice: [1, 2, 3]}}\n"
RATES = "search: {learning_rate: {loguniform: [1.0e-5, 3.0e-3]}}\n"
WSD = "train: {schedule: warmup_stable_decay, warmup: 0.1}\n"


def text(sweep: str, before: str = "") -> str:
    return BASE + before + "sweep:\n" + "".join(f"  {line}\n" for line in sweep.splitlines())


def sweep(written: str, before: str = "", *overrides: str) -> JobSpec:
    return parse_spec(text(written, before), "job.yaml", list(overrides))


def refused(written: str, before: str = "", *overrides: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        sweep(written, before, *overrides)
    return caught.value


# --- what is read


def test_the_shortest_sweep_has_good_defaults():
    found = sweep(RATES).sweep
    assert found is not None
    assert (found.searcher, found.scheduler, found.metric, found.better) == ("random", "asha", "validation_loss", "min")
    assert (found.count, found.grace_epochs, found.asha_reduction, found.placement) == (12, 1.0, 2, "auto")


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (EPOCHS, 3),
        (EPOCHS + "trials: all", 3),
        (EPOCHS + "trials: 2", 2),
        ("search: {seed: {randint: [0, 99]}}", 24),
        ("search: {seed: {randint: [0, 99]}}\ntrials: all", 100),
        (RATES + "trials: 30", 30),
    ],
)
def test_how_many_trials_there_are(written: str, count: int):
    job = sweep(written)
    assert job.sweep is not None
    assert job.sweep.count == count
    found = configs(job)
    assert found is not None
    assert len(found) == count


def test_a_short_and_a_full_name_mean_the_same_field():
    short, full = sweep(EPOCHS), sweep("search: {train.epochs: {choice: [1, 2, 3]}}")
    assert short.sweep is not None
    assert full.sweep is not None
    assert short.sweep.space == full.sweep.space
    assert configs(short) == configs(full)


def test_a_sweep_survives_json():
    job = sweep(EPOCHS + "scheduler: none\nbudget: {tokens: 5}")
    assert JobSpec.model_validate_json(job.model_dump_json()) == job


def test_reading_a_sweep_imports_nothing_heavy():
    script = (
        "import sys; from orchestrator.spec.sweep import configs; from orchestrator.spec.loading import load_spec;"
        "configs(load_spec('jobs/examples/finance-entities-sweep.yaml'));"
        "print([name for name in ('torch', 'ray', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what is refused


@pytest.mark.parametrize(
    ("written", "line", "field", "said"),
    [
        ("search:\n  learning_rat: {choice: [1, 2]}", 7, "search.learning_rat", "Did you mean learning_rate?"),
        ("search:\n  lr: {choice: [1, 2]}", 7, "search.lr", "Did you mean train.learning_rate?"),
        ("search:\n  train.epoch: {choice: [1, 2]}", 7, "search.train.epoch", "Did you mean train.epochs?"),
        ("search:\n  zzz: {choice: [1, 2]}", 7, "search.zzz", "can be searched: learning_rate, epochs"),
        ("search:\n  max_length: {choice: [100, 200]}", 7, "search.max_length", "`max_length` cannot be searched"),
        ("search:\n  name: {choice: [x, y]}", 7, "search.name", "`name` cannot be searched"),
        ("search:\n  base_model: {choice: [x, y]}", 7, "search.base_model", "rank, alpha, dropout, targets"),
        ("search:\n  data.train: {choice: [x, y]}", 7, "search.data.train", "cannot be searched"),
        ("search:\n  dtype: {choice: [float32]}", 7, "search.dtype", "cannot be searched"),
        ("search:\n  train.checkpoint: {choice: [1]}", 7, "search.train.checkpoint", "cannot be searched"),
        ("search:\n  rank: {choice: [4]}\n  tuning.rank: {choice: [8]}", 8, "search.tuning.rank", "searched twice"),
        ("search:\n  train: {epochs: {choice: [1, 2]}}", 7, "search.train", "Write epochs directly below search."),
        ("search:\n  epochs: [1, 2]", 7, "search.epochs", "For instance {choice: [1, 2]}."),
        ("search:\n  epochs: 2", 7, "search.epochs", "is 2; allowed: one of {loguniform"),
        ("search:\n  epochs: {choice: [1], grid: [2]}", 7, "search.epochs", "allowed: one of {loguniform"),
        ("search:\n  epochs:\n    choice: []", 8, "search.epochs.choice", "is empty. List the values to try."),
        ("search:\n  epochs:\n    choice: [1, 1]", 8, "search.epochs.choice", "has 1 twice"),
        (
            "search:\n  epochs:\n    randint: [3, 1]",
            8,
            "search.epochs.randint",
            "from 3 down to 1: it is empty. Write [1, 3].",
        ),
        ("search:\n  epochs:\n    uniform: [1, 1]", 8, "search.epochs.uniform", "one value, no range"),
        (
            "search:\n  epochs:\n    loguniform: [0, 1]",
            8,
            "search.epochs.loguniform",
            "range through zero has no beginning",
        ),
        ("search:\n  epochs:\n    loguniform: [-1, 1]", 8, "search.epochs.loguniform", "range through zero"),
        (
            "search:\n  epochs:\n    uniform: [a, 1]",
            8,
            "search.epochs.uniform.0",
            "is 'a'; allowed: a list of 2: a number",
        ),
        ("search:\n  epochs:\n    uniform: [1]", 8, "search.epochs.uniform.1", "is missing"),
        ("search:\n  epochs:\n    choice:\n    - 1\n    - -1", 10, "search.epochs.choice.1", "takes a number above 0"),
        ("search:\n  epochs: {choice: [true]}", 7, "search.epochs.choice.0", "is true; train.epochs takes a number"),
        ("search:\n  rank: {choice: [4, 0]}", 7, "search.rank.choice.1", "tuning.rank takes a whole number at least 1"),
        ("search:\n  rank: {uniform: [4, 8]}", 7, "search.rank.uniform", "takes whole numbers. Use randint"),
        ("search:\n  rank: {choice: [4, 8.5]}", 7, "search.rank.choice.1", "a whole number at least 1"),
        ("search:\n  schedule: {choice: [cosin]}", 7, "search.schedule.choice.0", "Did you mean cosine?"),
        ("search:\n  learning_rate: {loguniform: [1, 1000]}", 7, "search.learning_rate.loguniform.1", "at most 100"),
        ("search: {}", 6, "search", "a mapping of at least one field"),
        ("search: [1]", 6, "search", "a mapping of at least one field"),
        ("trials: 3", 5, "search", "is missing"),
        (EPOCHS + "trials: 4", 7, "trials", "the space has 3 combinations"),
        (EPOCHS + "trials: 4\nsearcher: grid", 7, "trials", "the space has 3 combinations"),
        (EPOCHS + "trials: 0", 7, "trials", "at least 1"),
        (EPOCHS + "trials: 1001", 7, "trials", "at most 1,000"),
        ("search: {seed: {randint: [0, 1000]}}\ntrials: all", 7, "trials", "would be 1,001 trials"),
        (RATES + "trials: all", 7, "trials", "has no end: learning_rate is loguniform"),
        (RATES + "searcher: grid", 7, "searcher", "grid cannot go through learning_rate"),
        (EPOCHS + "searcher: bayes", 7, "searcher", "random, grid or optuna"),
        (EPOCHS + "budget: {seconds: 0}", 7, "budget.seconds", "a number above 0"),
        (EPOCHS + "budget: {tokens: 0}", 7, "budget.tokens", "at least 1"),
        (EPOCHS + "metric: val_loss", 7, "metric", "Did you mean validation_loss?"),
        (EPOCHS + "metric: entity_f1", 7, "metric", "reported by nobody, since there is no `evaluate`"),
        (EPOCHS + "metric: f1", 7, "metric", "exact_match, json_valid or entity_f1"),
        (EPOCHS + "metric: [entity_f1]", 7, "metric", "validation_loss, exact_match"),
        (EPOCHS + "metric: true", 7, "metric", "is true; allowed: validation_loss"),
        (EPOCHS + "mode: max", 7, "mode", "would choose the worst trial by validation_loss"),
        (EPOCHS + "grace: 0.5", 7, "grace", "trials report first after 1. Write at least 1"),
        (EPOCHS + "scheduler: median\ngrace: 0.5", 8, "grace", "trials report first after 1"),
        ("search: {epochs: {choice: [0.5, 2]}}\ngrace: 0.4", 7, "grace", "trials report first after 0.5"),
        (EPOCHS + "scheduler: none\ngrace: 2", 8, "grace", "no scheduler stops a trial"),
        (
            EPOCHS + "scheduler: median\nreduction_factor: 2",
            8,
            "reduction_factor",
            "means nothing to the scheduler median",
        ),
        (EPOCHS + "metrics: x", 7, "metrics", "Did you mean sweep.metric?"),
    ],
)
def test_an_error_names_file_line_field_and_what_to_do(written: str, line: int, field: str, said: str):
    error = refused(written)
    assert said in str(error)
    assert error.message.startswith(f"job.yaml, line {line}: ")
    assert error.context["field"] == f"sweep.{field}"


@pytest.mark.parametrize(
    ("written", "before", "override", "said"),
    [
        (
            EPOCHS,
            "",
            "data.validation=0",
            "`sweep.metric` validation_loss is reported by nobody, since data.validation is 0",
        ),
        (
            EPOCHS + "metric: entity_f1",
            "evaluate: {metrics: [json_valid]}\n",
            "data.test=t.jsonl",
            "not among evaluate.metrics",
        ),
        (
            EPOCHS + "mode: min\nmetric: entity_f1",
            "evaluate: {metrics: [entity_f1]}\n",
            "data.test=t",
            "worst trial by entity_f1",
        ),
        (
            "search: {rank: {choice: [4, 8]}}",
            "tuning: {type: full}\n",
            "train.seed=1",
            "tuning.type full has no such field",
        ),
        (EPOCHS + "placement: packed", "tuning: {type: qlora}\n", "train.seed=1", "packed needs tuning.type lora"),
        (EPOCHS + "placement: packed", "tuning: {type: full}\n", "train.seed=1", "packed needs tuning.type lora"),
        (EPOCHS + "placement: packed", "", "train.packing=false", "packed needs train.packing"),
        (EPOCHS + "placement: concurrent", "", "train.packing=false", ""),
        (EPOCHS, "", "train.warmup=0.5", ""),
        (EPOCHS, WSD, "train.warmup=0.5", "a warmup of 0.5 of 3 epochs is as long as the shortest trial"),
        (EPOCHS, WSD, "sweep.trials=7", "--set sweep.trials=7: `sweep.trials` is 7"),
        (EPOCHS, "", "sweep.search.lr={choice: [1]}", "there is no field `lr` to search"),
    ],
)
def test_what_the_rest_of_the_spec_says_counts(written: str, before: str, override: str, said: str):
    if said:
        assert said in str(refused(written, before, override))
    else:
        sweep(written, before, override)


@pytest.mark.parametrize("scheduler", ["asha", "none"])
def test_a_metric_needs_validation_rows_to_choose_by(scheduler: str):
    written = EPOCHS + f"metric: json_valid\nscheduler: {scheduler}"
    evaluate = "evaluate: {metrics: [exact_match, json_valid]}\n"
    error = refused(written, evaluate, "data.test=t.jsonl", "data.validation=0")
    assert "`sweep.metric` json_valid is reported by nobody, since data.validation is 0" in str(error)
    found = sweep(written, evaluate, "data.test=t.jsonl").sweep
    assert found is not None
    assert (found.metric, found.better) == ("json_valid", "max")


def test_every_problem_is_told_at_once():
    error = refused("search: {lr: {choice: [1]}}\nmode: max\ngrace: 0.1")
    assert all(word in str(error) for word in ("`lr`", "`sweep.mode`", "`sweep.grace`"))


def test_a_spec_made_in_python_is_refused_in_words_too():
    with pytest.raises(ValidationError, match="the space has 3 combinations"):
        JobSpec.model_validate(
            {
                "name": "a",
                "base_model": "m",
                "data": {"train": "x"},
                "sweep": {"search": {"epochs": {"choice": [1, 2, 3]}}, "trials": 9},
            }
        )


@pytest.mark.parametrize(
    "search",
    [
        "rslora: {choice: [true, false]}",
        "targets: {choice: [all-linear, [q_proj, v_proj]]}",
        "max_grad_norm: {choice: [null, 0.5]}",
        "schedule: {grid: [cosine, warmup_stable_decay]}",
        "dropout: {uniform: [0, 0.2]}",
        "batch_size: {randint: [8, 32]}",
        "warmup_steps: {choice: [0, 10]}",
    ],
)
def test_what_can_be_searched_reaches_each_trial(search: str):
    job = sweep(f"search:\n  {search}")
    found = configs(job)
    assert found
    for config in found:
        [(name, value)] = config.items()
        section, _, field = name.partition(".")
        assert getattr(getattr(trial_spec(job, config), section), field) == value


# --- which trials


def test_the_first_points_are_the_rates_that_lora_likes():
    job = sweep(
        "search: {learning_rate: {loguniform: [1.0e-5, 3.0e-3]}, rank: {choice: [4, 8, 16]}, epochs: {choice: [1, 2]}}"
    )
    first = {
        "tuning.rank": 8,
        "train.epochs": 1,
    }  # the spec's own rank; of epochs, whose 3 is not in the range, one that is
    assert suggested(job) == [
        {"train.learning_rate": 3e-4, **first},
        {"train.learning_rate": 1e-3, **first},
    ]
    found = configs(job)
    assert found is not None
    assert found[:2] == suggested(job)
    assert all(3e-3 >= config["train.learning_rate"] >= 1e-5 for config in found)


@pytest.mark.parametrize(
    ("written", "before"),
    [
        (EPOCHS, ""),
        ("search: {learning_rate: {loguniform: [1.0e-6, 1.0e-4]}}", ""),
        ("search: {learning_rate: {choice: [1.0e-4, 2.0e-3]}}", ""),
        (RATES, "tuning: {type: full}\n"),
    ],
)
def test_no_point_is_suggested_outside_the_space_or_for_full_tuning(written: str, before: str):
    assert suggested(sweep(written, before)) == []


def test_a_rate_that_is_listed_comes_first():
    job = sweep("search: {learning_rate: {choice: [1.0e-5, 1.0e-4, 3.0e-4, 3.0e-3]}}\ntrials: 2")
    found = configs(job)
    assert found is not None
    assert found[0] == {"train.learning_rate": 3e-4}
    assert len(found) == 2


def test_the_grid_is_gone_through_in_one_order():
    job = sweep("search: {rank: {choice: [4, 8]}, epochs: {choice: [1, 2]}}\nsearcher: grid")
    expected = [{"train.epochs": epochs, "tuning.rank": rank} for epochs in (1, 2) for rank in (4, 8)]
    assert configs(job) == expected
    assert [list(config) for config in configs(job) or []] == [["train.epochs", "tuning.rank"]] * 4


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_the_order_in_which_fields_are_written_decides_nothing(searcher: str):
    """A job reads its spec from JSON whose keys are sorted, and must try what the dry run showed."""
    ranges = "rank: {choice: [4, 8, 16]}, learning_rate: {choice: [1.0e-4, 1.0e-3]}, epochs: {randint: [1, 3]}"
    written = sweep(f"search: {{{ranges}}}\nsearcher: {searcher}\ntrials: 7")
    stored = JobSpec.model_validate(json.loads(json.dumps(written.model_dump(mode="json"), sort_keys=True)))
    assert configs(stored) == configs(written)
    assert suggested(stored) == suggested(written)


def test_optuna_decides_as_it_goes():
    assert configs(sweep(RATES + "searcher: optuna")) is None


# --- a trial as a run


def test_a_trial_is_the_run_that_a_person_would_have_written():
    job = sweep("search: {learning_rate: {choice: [1.0e-3]}, rank: {choice: [4, 8]}}", "train: {epochs: 2}\n")
    alone = parse_spec(
        BASE + "train: {epochs: 2, learning_rate: 1.0e-3}\ntuning: {rank: 4}\n", "job.yaml", ["name=a-t01"]
    )
    assert trial_spec(job, {"train.learning_rate": 1e-3, "tuning.rank": 4}, trial=trial_name(1)) == alone
    assert trial_spec(job, {"learning_rate": 1e-3, "rank": 4}, trial="t01") == alone
    assert trial_spec(job, {"rank": 4}).name == "a"


def test_a_trial_with_a_value_that_is_none_is_refused():
    with pytest.raises(ValidationError):
        trial_spec(sweep(EPOCHS), {"train.epochs": -1})


def test_the_name_of_a_trial_is_one():
    long = trial_spec(sweep(EPOCHS, "", f"name={'a' * 58}-bcd"), {"epochs": 1}, trial="t123")
    assert long.name == "a" * 58 + "-t123"
    assert [trial_name(number) for number in (1, 24, 100)] == ["t01", "t24", "t100"]


def test_trials_of_a_trunk_warm_up_as_long_as_the_longest():
    job = sweep(EPOCHS, WSD)
    for epochs in (1, 2, 3):
        assert (
            trunk_warmup(job, {"train.epochs": epochs}, rows=160) == 3
        )  # a tenth of the 30 steps that three epochs take
        trial = trial_spec(job, {"train.epochs": epochs}, warmup_steps=3)
        assert (trial.train.warmup_steps, trial.train.epochs) == (3, epochs)


@pytest.mark.parametrize(
    ("written", "before"),
    [
        (EPOCHS, "train: {schedule: cosine}\n"),
        ("search: {rank: {choice: [4, 8]}}", WSD),
        (EPOCHS, "train: {schedule: warmup_stable_decay, warmup_steps: 5}\n"),
        ("search: {epochs: {choice: [1, 2]}, warmup_steps: {choice: [1, 2]}}", WSD),
    ],
)
def test_without_a_trunk_the_warmup_is_the_specs(written: str, before: str):
    job = sweep(written, before)
    config = (configs(job) or [])[0]
    assert trunk_warmup(job, config, rows=160) is None
    assert trial_spec(job, config, warmup_steps=99) == trial_spec(job, config)


def test_a_searched_schedule_or_warmup_has_its_own_trunk():
    job = sweep(
        "search: {epochs: {choice: [1, 2]}, schedule: {choice: [cosine, warmup_stable_decay]}}",
        "train: {warmup: 0.1}\n",
    )
    assert trunk_warmup(job, {"epochs": 1, "schedule": "cosine"}, rows=160) is None
    assert trunk_warmup(job, {"epochs": 1, "schedule": "warmup_stable_decay"}, rows=160) == 2
    searched = sweep("search: {epochs: {choice: [1, 2]}, warmup: {choice: [0.1, 0.2]}}", WSD)
    assert trunk_warmup(searched, {"epochs": 1, "warmup": 0.2}, rows=160) == 4


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "most", "steps"), [(160, 2, 16, None, 20), (10, 0.01, 16, None, 1), (33, 1, 16, 2, 2)]
)
def test_steps_are_counted_as_training_counts_them(rows: int, epochs: float, batch: int, most: int | None, steps: int):
    from jobs.train.batches import Batches

    spec = sweep(EPOCHS, "", f"train.epochs={epochs}", f"train.batch_size={batch}", f"train.max_steps={most or 'null'}")
    assert total_steps(spec, rows) == steps
    batches = Batches([8] * rows, batch_size=batch, epochs=epochs, seed=0, max_steps=most)
    assert batches.total_steps == steps
