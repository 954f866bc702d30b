"""Learning rates of each step. 3 seconds, mostly transformers' import."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from jobs.train.schedule import learning_rates
from orchestrator.spec.job import TrainSpec

STEPS = 100


def rates(schedule: str, steps: int = STEPS, **fields: Any) -> list[float]:
    spec = TrainSpec.model_validate({"learning_rate": 1e-3, "warmup": 0.1, "schedule": schedule} | fields)
    rate = learning_rates(spec, steps)
    return [rate(step) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_it_rises_to_the_learning_rate_and_never_jumps(schedule: str) -> None:
    found = rates(schedule)
    assert all(0 < rate <= 1e-3 for rate in found)  # no step is spent at a rate of zero
    assert found[:10] == sorted(found[:10])
    assert max(found) == pytest.approx(1e-3, rel=1e-2)
    # warmup takes ten steps, so nothing moves faster than a tenth of the whole in one step
    assert all(abs(b - a) <= 1.001e-4 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "warmup_stable_decay"])
def test_it_ends_near_zero(schedule: str) -> None:
    assert rates(schedule)[-1] < 0.03e-3
    assert rates(schedule)[-10:] == sorted(rates(schedule)[-10:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_a_resumed_run_gets_the_rates_it_would_have_got(schedule: str) -> None:
    spec = TrainSpec.model_validate({"schedule": schedule})
    undisturbed, resumed = learning_rates(spec, STEPS), learning_rates(spec, STEPS)
    whole = [undisturbed(step) for step in range(STEPS)]
    assert [resumed(step) for step in range(60, STEPS)] == whole[60:]


def test_warmup_stable_decay_is_flat_in_between() -> None:
    found = rates("warmup_stable_decay", decay=0.2)
    assert set(found[10:80]) == {1e-3}
    assert found[79] > found[85] > found[95] > found[99]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_learn_in_every_step(schedule: str, steps: int) -> None:
    assert all(0 < rate <= 1e-3 for rate in rates(schedule, steps, warmup=0.03))
