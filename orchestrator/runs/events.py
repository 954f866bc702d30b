"""Events: what a run says about itself, from the job up to the control plane, through the store.

A writer (the job's driver, or a worker) buffers events and writes them as numbered segments of JSON lines. Segments are
never changed once written, and an event's id is its attempt, writer and sequence number, so reading one twice is harmless.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from pydantic import BaseModel, Field

from orchestrator.runs.segments import SegmentWriter, list_segments, read_segment
from orchestrator.store import Store

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics", "phase", "progress", "state", "sweep", "trial"]


class Event(BaseModel):
    """One thing that happened in a run."""

    id: str
    """`a<attempt>-<writer>-<sequence>`."""

    created_at: float
    """Seconds since the epoch."""

    type: EventType
    """`metrics`: `data` has `step` and numbers (`loss`, `learning_rate`, `grad_norm`, `tokens`, `tokens_per_second`,
    `seconds_left`, `epoch`, `total_steps`, or `validation_loss`). `phase`: `data.phase` names what begins. `progress`:
    `data` has `phase`, `done`, `total`. `state`: `data.state` is a RunState. `message`: words only.
    `trial`: `data` has `trial` (its name), `config`, `state` (a TrialState), and as far as known `step`, `total_steps`, `epoch`, `loss`,
    `validation_loss`, `learning_rate`, `tokens`, `metrics` (what `evaluate` measured); the last event of a trial is the truth. `sweep`:
    `data` has `plan` (`placement` and `why`), `best` (a trial's name) with `metric` (its value), `compute`, or `seconds_left`."""

    level: Level = "info"
    message: str = ""
    data: dict[str, Any] = Field(default_factory=dict)


class Events(Protocol):
    """Where a job says what happens: an `EventWriter`, or what stands in its place."""

    def emit(self, type: EventType, message: str = "", *, level: Level = "info", **data: Any) -> None: ...
    def flush(self) -> None: ...


class EventWriter:
    """Writes events to the store, buffered as `SegmentWriter` says.

    Args:
        writer: distinguishes writers of one attempt, e.g. `driver`, `rank0`.
        interval: seconds between segments.
    """

    def __init__(self, store: Store, run: str, attempt: int, writer: str, *, interval: float = 1.0):
        self._segments = SegmentWriter(store, run, "events", attempt, writer, interval=interval)
        self._prefix = f"a{attempt}-{writer}"
        # A restarted writer's events must not take the ids of those before: leave room for a million in each segment.
        self._sequence = itertools.count(self._segments.number * 1_000_000)
        self._lock = threading.Lock()

    def emit(
        self,
        type: EventType,
        message: str = "",
        *,
        level: Level = "info",
        **data: Any,
    ) -> None:
        with self._lock:  # so that ids and lines have one order
            event_id = f"{self._prefix}-{next(self._sequence)}"
            event = Event(id=event_id, created_at=time.time(), type=type, level=level, message=message, data=data)
            self._segments.append(event.model_dump_json())

    def flush(self) -> None:
        """Write what is buffered now; on a store failure it is kept for the next time."""
        self._segments.flush()

    def close(self) -> None:
        """Write the rest and stop the thread."""
        self._segments.close()


def read_events(store: Store, run: str, *, attempt: int | None = None, seen: set[str] | None = None) -> Iterator[Event]:
    """Events of a run, each writer's in order; segments named in `seen` are skipped, and those read are added to it."""
    for paths in list_segments(store, run, "events", attempt=attempt).values():
        for path in paths:
            if seen is not None and path in seen:
                continue
            yield from read_segment(store, path, Event)
            if seen is not None:
                seen.add(path)
