"""Events: what a run says about itself, from the job up to the control plane, through the store.

A writer (the job's driver, or a worker) buffers events and writes them as numbered segments of JSON lines. Segments are
never changed once written, and an event's id is its attempt, writer and sequence number, so reading one twice is harmless.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from orchestrator.errors import StoreError
from orchestrator.store import Store, segment_path, segments_path

log = logging.getLogger(__name__)

EventType = Literal["message", "metrics", "phase", "progress", "state"]


class Event(BaseModel):
    """One thing that happened in a run."""

    id: str
    """`a<attempt>-<writer>-<sequence>`."""

    created_at: float
    """Seconds since the epoch."""

    type: EventType
    """`metrics`: `data` has `step` and numbers (`loss`, `learning_rate`, `grad_norm`, `tokens`, `tokens_per_second`,
    `seconds_left`, `epoch`, `total_steps`, or `validation_loss`). `phase`: `data.phase` names what begins. `progress`:
    `data` has `phase`, `done`, `total`. `state`: `data.state` is a RunState. `message`: words only."""

    level: Literal["info", "warn", "error"] = "info"
    message: str = ""
    data: dict[str, Any] = Field(default_factory=dict)


class EventWriter:
    """Buffers events and writes them to the store from a thread of its own.

    A store that is away for a while delays segments and loses none: they are kept and written when it is back. A
    monitoring failure never stops the run.

    Args:
        writer: distinguishes writers of one attempt, e.g. `driver`, `rank0`.
        interval: seconds between segments.
    """

    def __init__(self, store: Store, run: str, attempt: int, writer: str, *, interval: float = 1.0):
        self._store, self._run, self._attempt, self._writer = store, run, attempt, writer
        self._interval = interval
        existing = [p for p in store.list(segments_path(run, "events")) if f"/a{attempt}-{writer}-" in p]
        self._segment = len(existing)
        self._sequence = self._segment * 1_000_000
        self._buffer: list[Event] = []
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="adaptory-events", daemon=True)
        self._thread.start()

    def emit(
        self,
        type: EventType,
        message: str = "",
        *,
        level: Literal["info", "warn", "error"] = "info",
        **data: Any,
    ) -> None:
        with self._lock:
            event_id = f"a{self._attempt}-{self._writer}-{self._sequence}"
            self._sequence += 1
            self._buffer.append(
                Event(id=event_id, created_at=time.time(), type=type, level=level, message=message, data=data)
            )

    def flush(self) -> None:
        """Write what is buffered as one segment; on a store failure keep it for the next time."""
        with self._lock:
            pending, self._buffer = self._buffer, []
        if not pending:
            return
        lines = "".join(event.model_dump_json() + "\n" for event in pending)
        try:
            self._store.write(
                segment_path(self._run, "events", self._attempt, self._writer, self._segment), lines.encode()
            )
            self._segment += 1
        except StoreError as error:
            log.warning("events are kept back: %s", error)
            with self._lock:
                self._buffer = pending + self._buffer

    def close(self) -> None:
        """Write the rest and stop the thread."""
        self._closing.set()
        self._thread.join(timeout=30)
        self.flush()

    def _loop(self) -> None:
        while not self._closing.wait(self._interval):
            self.flush()


def read_events(store: Store, run: str, *, seen: set[str] | None = None) -> Iterator[Event]:
    """Events of a run in segment order; segments named in `seen` are skipped, and those read are added to it."""
    for path in store.list(segments_path(run, "events")):
        if seen is not None and path in seen:
            continue
        for line in store.read(path).splitlines():
            yield Event.model_validate_json(line)
        if seen is not None:
            seen.add(path)
