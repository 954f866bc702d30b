"""Which trials a group computes, by what it is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.sweep import courses as module
from jobs.sweep.broker import Config, Orders
from jobs.sweep.courses import Courses
from jobs.sweep.packed import Forerunner
from jobs.sweep.reports import Compute
from jobs.train.setup import Place
from orchestrator.errors import NoFreeLane
from orchestrator.spec.job import JobSpec
from orchestrator.store import Store

CONFIGS: dict[str, Config] = {f"t{n}": {"train.learning_rate": n / 1000} for n in (1, 2, 3)}


class Group:
    """Has two lanes, and computes nothing."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.over: Forerunner | None = None
        self.alone = Compute()

    def forerunner(self, trial: str, spec: JobSpec) -> Forerunner | None:
        return self.over

    def open(self, trial: str, spec: JobSpec) -> None:
        if len(self.steps) == 2:
            raise NoFreeLane("none", hint="")
        self.steps[trial] = 0

    def company(self, trial: str) -> list[str]:
        return []

    def close(self, trial: str) -> None:
        del self.steps[trial]


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def courses(group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Courses:
    monkeypatch.setattr(module, "UNCLAIMED_SECONDS", 0.0)
    spec = {"name": "one", "base_model": "tiny", "data": {"train": "rows"}, "tuning": {"type": "lora"}}
    job = JobSpec.model_validate(spec | {"sweep": {"search": {"learning_rate": {"loguniform": [1e-4, 1e-2]}}}})
    session: Any = SimpleNamespace(
        spec=job, store=Store(str(tmp_path)), place=Place(), resolved=SimpleNamespace(run="one-run")
    )
    network: Any = group
    base: Any = None  # for what is written
    return Courses(session, network, base, rows=64)


def test_who_goes_makes_room_for_who_waits(courses: Courses, group: Group) -> None:
    courses.follow(Orders(open=CONFIGS, broker="one"))
    assert [*group.steps] == ["t1", "t2"]
    courses.follow(Orders(close=["t1"], broker="one"))
    assert [*group.steps] == ["t2", "t3"]
    assert not courses.unclaimed_for_long


def test_whom_the_broker_that_was_killed_would_have_closed_goes_as_well(courses: Courses, group: Group) -> None:
    """One of the two that it no longer names is computed, the other waits for a lane."""
    courses.follow(Orders(open=CONFIGS, broker="one"))
    courses.follow(Orders(broker="two"))
    assert courses.unclaimed_for_long
    courses.follow(Orders(open={"t1": CONFIGS["t1"]}, broker="two"))
    assert [*group.steps] == ["t1", "t2"], "the other may still come"
    courses.close_unclaimed()
    courses.follow(Orders(broker="two"))
    assert [*group.steps] == ["t1"]
    assert not courses.unclaimed_for_long


def test_what_another_has_reported_on_the_same_way_is_told_before_a_step_is_taken(
    courses: Courses, group: Group
) -> None:
    way = [{"step": n, "tokens": 10 * n, "state": "running", "total_steps": 12} for n in (4, 8)]
    courses.history["long"] = [*way, {"step": 12, "tokens": 120, "state": "finished", "total_steps": 12}]
    group.over = Forerunner("long", 8, 9)
    courses.follow(Orders(open={"t1": CONFIGS["t1"], "t2": CONFIGS["t2"]}, broker="one"))
    assert courses.busy
    assert not group.steps, "first the scheduler decides about what they would report"
    assert courses.fresh["t1"] == courses.fresh["t2"] == [said | {"total_steps": 9} for said in way]
    assert group.alone == Compute(16, 160), "what both would have cost as runs of their own"
    courses.follow(Orders(close=["t1"], broker="one"))
    assert [*group.steps] == ["t2"]
    assert group.alone == Compute(8, 80)
    assert not courses.follow(Orders(broker="one"))
    assert group.alone == Compute(8, 80)


def test_nobodys_way_is_told_that_led_to_no_report(courses: Courses, group: Group) -> None:
    courses.history["long"] = [{"step": 4, "tokens": 40, "state": "running", "total_steps": 12}]
    group.over = Forerunner("long", 3, 9)
    courses.follow(Orders(open={"t1": CONFIGS["t1"]}, broker="one"))
    assert [*group.steps] == ["t1"]
