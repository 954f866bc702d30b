"""Trials that train apart: what they computed, and what of them is kept. Below a second, after Ray is imported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.sweep import history
from jobs.sweep.configs import CONFIG
from jobs.sweep.separate import SeparateTrials
from orchestrator.errors import Superseded
from orchestrator.runs.states import TrialState
from orchestrator.spec.sweep import SweepSpec
from orchestrator.store import (
    Store,
    attempt_path,
    checkpoint_path,
    control_path,
    history_path,
    separate_path,
    trial_path,
    trial_run,
)


class Silent:
    def emit(self, *_: Any, **__: Any) -> None:
        """Nothing."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def trials(store: Store) -> SeparateTrials:
    """Three, each with what it has trained in the store."""
    sweep = SweepSpec.model_validate({"search": {"learning_rate": {"grid": [1e-4, 1e-3, 1e-2]}}})
    made = SeparateTrials(sweep, Silent(), store, "r")
    given = [
        SimpleNamespace(trial_id=f"id{n}", config={CONFIG: {}}, status="PENDING", last_result={}) for n in range(3)
    ]
    made.made(given)
    for one in given:
        store.write(f"{trial_path('r', one.trial_id)}/weights", b"w")
    return made


def finished(loss: float, tokens: int = 100) -> dict[str, Any]:
    return {"state": "finished", "step": 4, "tokens": tokens, "validation_loss": loss}


def kept(store: Store) -> list[str]:
    return [path.split("/")[3] for path in store.list("runs/r/trials")]


def test_of_whole_weights_only_the_best_so_far_are_kept(trials: SeparateTrials, store: Store) -> None:
    trials.keeps_all = False
    trials.reported("id0", finished(1.0))
    assert kept(store) == ["id0", "id1", "id2"], "those under way may win"
    trials.reported("id1", finished(2.0))
    assert kept(store) == ["id0", "id2"]
    trials.reported("id2", finished(0.5))
    assert kept(store) == ["id2"]
    assert trials.best == "id2"


def test_adapters_are_all_kept(trials: SeparateTrials, store: Store) -> None:
    for number in range(3):
        trials.reported(f"id{number}", finished(float(number)))
    assert kept(store) == ["id0", "id1", "id2"]


def test_what_trials_computed_adds_up(trials: SeparateTrials) -> None:
    trials.progressed("id0", {"state": "running", "step": 3, "tokens": 70})
    trials.reported("id1", finished(1.0, tokens=200))
    trials.reported("id1", finished(1.0, tokens=200))
    assert trials.tokens == 270
    compute = trials.compute
    assert (compute.steps, compute.tokens, compute.separate_steps, compute.separate_tokens) == (7, 270, 7, 270)
    trials.ended("id0", TrialState.STOPPED)
    assert trials.tokens == 270


def test_a_trial_lies_below_its_sweep_and_belongs_to_it() -> None:
    run = trial_run("r", "id0")
    assert checkpoint_path(run, 4).startswith(f"{separate_path('r')}/id0/")
    assert history_path("r", "id0").startswith(f"{separate_path('r')}/id0/")
    assert attempt_path(run) == attempt_path("r"), "an attempt owns all trials of a sweep"
    assert control_path("r", 1) == "runs/r/control/a1.json"


def test_a_late_attempt_is_fenced_off_its_trials(store: Store) -> None:
    from jobs.train.fence import check_still_ours

    store.write_json(attempt_path("r"), {"attempt": 2})
    check_still_ours(store, trial_run("r", "id0"), 2)
    with pytest.raises(Superseded):
        check_still_ours(store, trial_run("r", "id0"), 1)


def test_a_history_is_what_was_written_last(store: Store) -> None:
    assert history.read(store, "r", "id0") == []
    history.write(store, "r", "id0", [finished(1.0)])
    assert history.read(store, "r", "id0") == [finished(1.0)]

    def flush(self) -> None: ...
