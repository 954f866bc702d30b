"""What the phases of one attempt share on one worker, and how they speak of it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.train.exhausted import explained_exhaustion
from jobs.train.setup import Place
from jobs.train.steps import Progress
from orchestrator.runs.events import Events, EventType
from orchestrator.runs.result import RunResult
from orchestrator.runs.states import RunState
from orchestrator.spec.job import JobSpec
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import Store


@dataclass
class Session:
    """One worker's part in one attempt."""

    resolved: ResolvedSpec
    attempt: int
    store: Store
    cache: Path
    place: Place
    events: Events | None = None
    """Where rank 0 says what happens; None on the others."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went, by phase; begins with what was spent before the worker."""
    report: Callable[[dict[str, Any], str], None] = lambda metrics, checkpoint: None
    """Told of each checkpoint (metrics, path in the store) on every rank: Ray Train's barrier."""
    progress: Progress = field(default_factory=lambda: Progress(step=0, total_steps=0))
    _phase: str = ""
    _open: list[str] = field(default_factory=list)
    """Phases that have begun and not ended, each within the one before it."""
    _inside: float = 0.0
    """Seconds that went to phases within the innermost one."""

    @property
    def spec(self) -> JobSpec:
        return self.resolved.spec

    def say(self, type: EventType, message: str = "", **data: Any) -> None:
        """An event of the run; ranks other than 0 are silent."""
        if self.events is not None:
            self.events.emit(type, message, **data)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a phase, and say it once: publishing goes on after evaluating, which a job may not do. A phase within
        another one has its seconds to itself, and the other is said again when it goes on."""
        self._say_phase(name)
        self._open.append(name)
        start, before, self._inside = time.perf_counter(), self._inside, 0.0
        try:
            with explained_exhaustion(name, self.cache):
                yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + took - self._inside, 2)
            self._inside = before + took
            self._open.pop()
        if self._open:
            self._say_phase(self._open[-1])

    def _say_phase(self, name: str) -> None:
        if name != self._phase:
            self.say("phase", phase=name)
            self._phase = name

    def metrics(self) -> dict[str, float]:
        """The last values, those that are numbers."""
        p = self.progress
        out = {
            "train_loss": p.loss,
            "steps": float(p.step),
            "tokens": float(p.tokens),
            "tokens_per_second": round(p.tokens_per_second, 1),
            "peak_memory_bytes": float(_peak_memory(self.place)),
        }
        if p.validation_loss is not None:
            out["validation_loss"] = p.validation_loss
        return {name: value for name, value in out.items() if math.isfinite(value)}

    def result(self, state: RunState, **fields: Any) -> RunResult:
        return RunResult(
            attempt=self.attempt,
            state=state,
            metrics=self.metrics() if self.progress.step else {},
            seconds=dict(self.seconds),
            finished_at=time.time(),
            **fields,
        )


def _peak_memory(place: Place) -> int:
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated(place.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
