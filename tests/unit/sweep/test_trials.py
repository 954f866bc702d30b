"""Which of a sweep's trials is the best, as reports come in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.sweep.configs import CONFIG
from jobs.sweep.experiment import nobody_won
from jobs.sweep.trials import Trials
from jobs.sweep.tuning import Budget
from orchestrator.runs.events import EventWriter
from orchestrator.runs.states import TrialState
from orchestrator.spec.sweep import SweepSpec
from orchestrator.store import Store


class Said:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def emit(self, type: str, message: str = "", **data: Any) -> None:
        self.events.append((type, data))


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def make(tmp_path: Path, said: Said) -> Any:
    """`make("entity_f1", 3)`: so many trials, as Tune has just made them."""

    def made(metric: str, count: int) -> Trials:
        sweep = SweepSpec.model_validate({"search": {"epochs": {"choice": [1, 2, 3]}}, "metric": metric})
        trials = Trials(sweep, said, Store(str(tmp_path)), "run")
        new = [
            SimpleNamespace(trial_id=f"id{n}", config={CONFIG: {"train.epochs": n}}, status="PENDING", last_result={})
            for n in range(1, count + 1)
        ]
        trials.made(new)
        return trials

    return made


def ended(trials: Trials, trial: str, loss: float, **metrics: float) -> None:
    trials.reported(trial, {"step": 3, "state": "finished", "validation_loss": loss, "metrics": metrics})


def best(trials: Trials) -> str | None:
    return trials.result("packed", "").best


def test_the_metric_decides_and_not_the_loss(make: Any, said: Said) -> None:
    trials = make("entity_f1", 3)
    ended(trials, "id1", 0.1, entity_f1=0.5, json_valid=1.0)
    ended(trials, "id2", 0.9, entity_f1=0.8, json_valid=0.2)
    ended(trials, "id3", 0.2, entity_f1=0.7)
    assert best(trials) == "t02"
    result = trials.result("packed", "")
    assert (result.metric, result.mode) == ("entity_f1", "max")
    assert result.winner is not None
    assert result.winner.metrics == {"validation_loss": 0.9, "entity_f1": 0.8, "json_valid": 0.2}
    assert [data["best"] for type, data in said.events if type == "sweep"] == ["t01", "t02"]
    finished = [data for type, data in said.events if type == "trial" and data["state"] == "finished"]
    assert finished[0]["metrics"] == {"entity_f1": 0.5, "json_valid": 1.0}


def test_of_equal_shares_the_lowest_loss_wins_whoever_is_heard_first(make: Any) -> None:
    for order in (("id1", "id2"), ("id2", "id1")):
        trials = make("exact_match", 2)
        for trial in order:
            ended(trials, trial, {"id1": 0.4, "id2": 0.3}[trial], exact_match=0.5)
        assert best(trials) == "t02"


def test_seconds_of_training_go_on_where_an_earlier_attempt_left_off(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes before the first step, and between attempts, is not training."""
    store, events = Store(str(tmp_path)), EventWriter(Store(str(tmp_path)), "run", 1, "driver")
    for at, state, step in ((1000.0, "pending", None), (1020.0, "running", 1), (1065.0, "running", 9)):
        with monkeypatch.context() as then:
            then.setattr("orchestrator.runs.events.time.time", lambda at=at: at)
            events.emit("trial", trial="t01", state=state, step=step)
    events.close()
    searched = {"search": {"epochs": {"choice": [1, 2]}}, "budget": {"seconds": 60}}
    trials = Trials(SweepSpec.model_validate(searched), said, store, "run")
    trials.made([SimpleNamespace(trial_id="id1", config={CONFIG: {}}, status="PENDING", last_result={})])
    budget = Budget(trials._sweep, seconds=lambda: trials.seconds, tokens=lambda: 0)
    clock = [5000.0]
    monkeypatch.setattr("jobs.sweep.trials.time.monotonic", lambda: clock[0])
    assert (trials.seconds, budget.spent) == (45.0, None)
    trials.progressed("id1", {"step": 10, "state": "running"})
    clock[0] += 14.0
    assert (trials.seconds, budget.spent) == (59.0, None)
    clock[0] += 1.0
    assert budget.spent == "60 seconds"


def test_one_without_the_metric_cannot_win(make: Any) -> None:
    trials = make("entity_f1", 2)
    ended(trials, "id1", 0.1)
    ended(trials, "id2", 0.9, entity_f1=0.0)
    assert best(trials) == "t02"


def test_where_none_has_the_metric_it_is_said_why(make: Any) -> None:
    trials = make("entity_f1", 2)
    report = {"step": 3, "state": "finished", "validation_loss": 0.1, "message": "could not be evaluated: no room"}
    trials.reported("id1", report)
    trials.ended("id2", TrialState.STOPPED)
    error = nobody_won(trials.result("packed", ""))
    assert error.message == (
        "Of the 1 trials that came to their end, none has entity_f1; of t01: could not be evaluated: no room."
    )

    def flush(self) -> None: ...
