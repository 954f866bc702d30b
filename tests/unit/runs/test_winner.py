"""Why the best trial is the best, in sentences that hold for few trials, many, and none."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from orchestrator.runs.states import TrialState
from orchestrator.runs.sweeps import SweepProgress, Trial
from orchestrator.runs.winner import edge, importance, reasons
from orchestrator.spec.search import Choice, Grid, LogUniform, RandInt, Uniform

FINISHED, STOPPED, DIVERGED = TrialState.FINISHED, TrialState.STOPPED, TrialState.DIVERGED


def trial(number: int, value: float | None, state: TrialState = FINISHED, **config: Any) -> Trial:
    full = {f"train.{name}": setting for name, setting in config.items()}
    return Trial(f"t{number:02d}", full, state, validation_loss=value, step=10)


def sweep(*trials: Trial, settled: bool = True) -> SweepProgress:
    return SweepProgress(named={one.name: one for one in trials}, settled=settled)


def grid(value: Any, noise: float = 0.0) -> list[Trial]:
    generator = random.Random(0)
    pairs = itertools.product([1e-4, 3e-4, 1e-3, 3e-3], [1, 2, 3])
    return [
        trial(number, value(rate, epochs) + generator.gauss(0, noise), learning_rate=rate, epochs=epochs)
        for number, (rate, epochs) in enumerate(pairs, 1)
    ]


def test_what_decides_everything_has_all_of_the_variance():
    found = importance(grid(lambda rate, epochs: rate * 100), "validation_loss")
    assert found is not None
    assert found.shares["train.learning_rate"] == pytest.approx(1.0)
    assert found.shares["train.epochs"] == 0.0
    assert (found.trials, found.stopped) == (12, 0)


def test_two_parameters_share_and_the_larger_comes_first():
    found = importance(grid(lambda rate, epochs: 2.0 * epochs + rate * 100, noise=0.05), "validation_loss")
    assert found is not None
    assert list(found.shares) == ["train.epochs", "train.learning_rate"]
    assert 0.9 < found.shares["train.epochs"] < 1.0


def test_better_than_nothing_has_no_percentage_and_is_no_chance():
    one, two = trial(1, 0.4, learning_rate=1e-3), trial(2, 0.2, learning_rate=1e-4)
    one.metrics, two.metrics = {"exact_match": 0.0}, {"exact_match": 0.25}
    progress = SweepProgress(metric="exact_match", mode="max", named={"t01": one, "t02": two}, settled=True)
    said = reasons(progress, {})
    assert said[0] == "t02 is 0.2500 better than t01, the second by exact_match."
    assert said[1] == "2 trials with an exact_match cannot say which parameter mattered (that takes 4)."


def test_equal_by_the_metric_is_said_and_what_decided_then():
    one, two = trial(1, 0.4, learning_rate=1e-3), trial(2, 0.2, learning_rate=1e-4)
    one.metrics = two.metrics = {"exact_match": 0.5}
    progress = SweepProgress(metric="exact_match", mode="max", named={"t01": one, "t02": two}, settled=True)
    assert reasons(progress, {})[0] == "t02 and t01 are equal by exact_match; t02 has the lower validation loss."


def test_what_is_chance_has_next_to_nothing():
    """Of as many groups, the plain share of variance would say a third or so."""
    generator = random.Random(1)
    shares = []
    for _ in range(200):
        trials = [trial(n, generator.random(), learning_rate=generator.random()) for n in range(12)]
        found = importance(trials, "validation_loss")
        assert found is not None
        shares.append(found.shares["train.learning_rate"])
    assert sum(shares) / len(shares) < 0.15


def test_a_range_with_a_value_for_each_trial_is_binned():
    rates = [10 ** -(2 + n / 8) for n in range(24)]
    trials = [trial(n, abs(n - 12) / 12, learning_rate=rate) for n, rate in enumerate(rates)]
    found = importance(trials, "validation_loss")
    assert found is not None
    assert found.shares["train.learning_rate"] > 0.6


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(1, 0.5, epochs=1)],
        [trial(n, 0.5 + n, epochs=n) for n in range(3)],
        [trial(n, 0.5, epochs=n) for n in range(12)],
        [trial(n, None, epochs=n) for n in range(12)],
        [trial(n, float(n), DIVERGED, epochs=n) for n in range(12)],
    ],
)
def test_too_little_says_nothing(trials: list[Trial]):
    assert importance(trials, "validation_loss") is None


def test_lists_missing_values_and_one_value_for_all_do_no_harm():
    targets: list[Any] = ["all-linear", ["q_proj", "v_proj"]]
    trials = [trial(n, n % 2 + n / 100, targets=targets[n % 2], seed=0, warmup=0.1) for n in range(8)]
    trials[3].config.pop("train.warmup")
    found = importance(trials, "validation_loss")
    assert found is not None
    assert found.shares["train.targets"] > 0.9
    assert "train.seed" not in found.shares


# --- sentences

SPACE = {"train.learning_rate": LogUniform(loguniform=(1e-5, 1e-2)), "train.epochs": Choice(choice=[1, 2, 3])}


def test_the_whole_story_of_a_winner():
    trials = grid(lambda rate, epochs: 1.0 + rate * 100 - 0.2 * epochs)
    trials[10].state = DIVERGED
    trials[11].state = STOPPED
    said = " ".join(reasons(sweep(*trials), {**SPACE, "train.learning_rate": Choice(choice=[1e-4, 3e-4, 1e-3, 3e-3])}))
    assert "t03 is 0.0200 (4.7%) better than t06, the second by validation_loss." in said
    assert "Of the differences between 11 trials, 1 of them with the value at which they were stopped" in said
    assert "learning_rate 0.0001 is at the lower edge of what was searched: widen the range downwards." in said
    assert "epochs 3 is at the upper edge of what was searched: widen the range upwards." in said
    assert "One trial diverged, at learning rate 0.003." in said


def test_a_second_that_is_close_is_said_to_be():
    assert "so little may be chance" in reasons(sweep(trial(1, 0.5), trial(2, 0.503)), {})[0]
    assert "may be chance" not in reasons(sweep(trial(1, 0.5), trial(2, 0.6)), {})[0]


def test_few_trials_are_said_to_be_few():
    said = reasons(sweep(trial(1, 0.5, epochs=2), trial(2, 0.7, epochs=1)), {})
    assert said[1] == "2 trials with a validation_loss cannot say which parameter mattered (that takes 4)."
    assert reasons(sweep(trial(1, 0.5, epochs=2)), {})[0] == "t01 is the only trial with a validation_loss."


def test_a_sweep_in_which_all_diverged_names_the_learning_rates():
    trials = [trial(n, None, DIVERGED, learning_rate=rate) for n, rate in enumerate((0.03, 0.01, 0.02), 1)]
    said = reasons(sweep(*trials), {})
    assert said == ["Every trial diverged, at learning rates 0.01 to 0.03. Search lower learning rates."]
    assert reasons(sweep(settled=False), {}) == ["No trial has reported validation_loss yet."]
    assert reasons(sweep(trial(1, None, STOPPED)), {}) == ["No trial came to report validation_loss."]


@pytest.mark.parametrize(
    ("one", "value", "side"),
    [
        (LogUniform(loguniform=(1e-5, 1e-1)), 1.5e-5, "lower"),
        (LogUniform(loguniform=(1e-5, 1e-1)), 1e-3, None),
        (LogUniform(loguniform=(1e-5, 1e-1)), 0.09, "upper"),
        (Uniform(uniform=(0, 1)), 0.05, "lower"),
        (Uniform(uniform=(0, 1)), 0.5, None),
        (Uniform(uniform=(0, 1)), 0.95, "upper"),
        (RandInt(randint=(1, 8)), 8, "upper"),
        (RandInt(randint=(1, 8)), 7, None),
        (RandInt(randint=(1, 2)), 2, None),
        (Choice(choice=[4, 8, 16]), 16, "upper"),
        (Choice(choice=[4, 8, 16]), 8, None),
        (Choice(choice=[4, 16]), 16, None),
        (Grid(grid=[16, 4, 8]), 4, "lower"),
        (Choice(choice=["cosine", "linear", "constant"]), "linear", None),
        (Choice(choice=[True, False]), True, None),
        (Choice(choice=[None, 0.5, 1.0]), None, None),
        (LogUniform(loguniform=(1e-5, 1e-1)), None, None),
    ],
)
def test_the_edge_of_a_range(one: Any, value: Any, side: str | None):
    assert edge(one, value) == side


def test_no_dropout_and_a_seed_are_no_edges():
    space = {"tuning.dropout": Uniform(uniform=(0, 0.2)), "train.seed": RandInt(randint=(0, 9))}
    best = Trial("t01", {"tuning.dropout": 0, "train.seed": 9}, FINISHED, validation_loss=0.5)
    assert not any("edge" in sentence for sentence in reasons(sweep(best), space))
