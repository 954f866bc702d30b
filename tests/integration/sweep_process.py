"""Attempts of sweeps as processes of their own, and what they came to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from orchestrator.runs.events import Event, read_events
from orchestrator.runs.result import RunResult, SweepResult, TrialResult
from orchestrator.runs.states import RunState
from orchestrator.spec.sweep import trial_spec, trunk_warmup
from orchestrator.store import result_path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900.0
"""Seconds for a sweep that takes thirty on a quiet machine."""
LOOK = 0.3
"""Seconds between looks, each of which reads all events: what runs beside it needs the core more."""
ROWS = 32
EVALUATE = {"metrics": ["exact_match", "entity_f1"], "max_new_tokens": 64}


class Running:
    """One attempt of a sweep, as a job of Ray's would be."""

    def __init__(self, job: Any, home: Path, attempt: int = 1):
        self.job, self.attempt = job, attempt
        self._printed = Path(tempfile.mkstemp(suffix=".log", dir=job.cache.parent)[1])
        words = ["--store", job.store.url, "--run", job.resolved.run, "--attempt", str(attempt)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.sweep", *words],
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
                "ADAPTORY_HOME": str(home),
            },
            cwd=ROOT,
            stdout=self._printed.open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def printed(self) -> str:
        return self._printed.read_text()[-6000:]

    def end(self) -> RunResult:
        patiently(lambda: self.process.poll() is not None, lambda: self.printed)
        assert self.job.store.exists(result_path(self.job.resolved.run)), self.printed
        result = RunResult.model_validate(self.job.store.read_json(result_path(self.job.resolved.run)))
        assert result.attempt == self.attempt, self.printed
        return result

    def events(self, type: str) -> list[Event]:
        return [event for event in read_events(self.job.store, self.job.resolved.run) if event.type == type]

    def until(self, seen: Callable[[], Any]) -> Any:
        def look() -> Any:
            found = seen()
            assert found or self.process.poll() is None, self.printed
            return found

        return patiently(look, lambda: self.printed)


def patiently(seen: Callable[[], Any], said: Callable[[], str] = str) -> Any:
    """What was seen at last. Time in which this process stands still, as all of the test may on a shared machine, does not count.

    Args:
        said: what the failure says when patience ends.
    """
    for _ in range(round(PATIENCE / LOOK)):
        if found := seen():
            return found
        time.sleep(LOOK)
    raise AssertionError(f"not seen in {PATIENCE:.0f} s: {said()}")


def trials(result: RunResult) -> SweepResult:
    assert result.state is RunState.SUCCEEDED, result.error
    assert result.sweep is not None
    return result.sweep


def solo(make_job: Any, job: Any, trial: TrialResult) -> RunResult:
    """The trial as a run of its own."""
    config = trial.config
    sections = trial_spec(job.resolved.spec, config, warmup_steps=trunk_warmup(job.resolved.spec, config, ROWS))
    tuned = {"train": sections.train.model_dump(), "tuning": sections.tuning.model_dump()}
    return make_job(model=Path(sections.base_model), name=f"solo-{trial.name}", **tuned).work()


def values(sweep: SweepResult) -> dict[str, float]:
    return {one.name: one.metrics["validation_loss"] for one in sweep.trials}


def actors(*names: str) -> list[psutil.Process]:
    """Processes of this session's Ray that are actors of a class which has one of these names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if any(f"ray::{name}" in title for name in names):
                found.append(process)
    return found


def kill(*names: str) -> None:
    """-9, one of them."""
    actors(*names)[0].kill()
