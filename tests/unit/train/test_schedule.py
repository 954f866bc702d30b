"""Learning rates of each step. 5 seconds, mostly the import of transformers to compare with."""

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
def test_steps_of_warmup_take_precedence_over_a_fraction(schedule: str) -> None:
    assert rates(schedule, warmup=0.5, warmup_steps=10) == rates(schedule, warmup=0.1)
    assert rates(schedule, warmup=0.5, warmup_steps=0) == rates(schedule, warmup=0.0)


def test_with_steps_of_warmup_a_shorter_run_is_the_longer_one_until_it_decays() -> None:
    fields = {"warmup_steps": 10, "decay": 0.2}
    longer = rates("warmup_stable_decay", 100, **fields)
    for steps in (50, 75):
        shorter = rates("warmup_stable_decay", steps, **fields)
        assert shorter[: steps - steps // 5] == longer[: steps - steps // 5]
        assert shorter[-1] < 0.06e-3


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_a_run_shorter_than_its_warmup_ends_on_the_way_up(schedule: str) -> None:
    assert rates(schedule, 4, warmup_steps=10) == rates("constant", 100, warmup_steps=10)[:4]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_learn_in_every_step(schedule: str, steps: int) -> None:
    assert all(0 < rate <= 1e-3 for rate in rates(schedule, steps, warmup=0.03))


@pytest.mark.parametrize("steps", [1, 7, STEPS])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
def test_the_curves_are_those_of_transformers(schedule: str, steps: int) -> None:
    import torch
    from transformers import optimization

    warmup, decay = round(0.1 * steps), max(1, round(0.2 * steps))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = {
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "warmup_stable_decay": lambda: optimization.get_wsd_schedule(
            optimizer, warmup, decay, num_stable_steps=max(0, steps - warmup - decay), decay_type="linear"
        ),
    }[schedule]()
    expected = [1e-3 * theirs.lr_lambdas[0](step + 0.5) for step in range(steps)]
    assert rates(schedule, steps, decay=0.2) == pytest.approx(expected, rel=1e-12)
