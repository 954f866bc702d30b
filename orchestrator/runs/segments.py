"""Numbered segments of JSON lines: how a job's events and logs reach the store.

A segment is written whole and never changed, so a reader sees all of it or nothing, and remembers only its path.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.errors import StoreError
from orchestrator.store import Store, segment_path, segments_path

log = logging.getLogger(__name__)

_NAME = re.compile(r"a(?P<attempt>\d+)-(?P<writer>.+)-(?P<number>\d+)\.jsonl$")
_LAST_TRIES = 3

Line = TypeVar("Line", bound=BaseModel)


class SegmentWriter:
    """Buffers lines and writes them as segments from a thread of its own.

    A store that is away for a while delays lines and loses none: they are kept and written when it is back. A
    monitoring failure never stops the run.

    Args:
        stream: `events` or `logs`.
        writer: distinguishes writers of one attempt, e.g. `driver`, `rank0`; a restarted one goes on behind its segments.
        interval: seconds between segments.
    """

    def __init__(self, store: Store, run: str, stream: str, attempt: int, writer: str, *, interval: float = 1.0):
        self._store, self._place, self._interval = store, (run, stream, attempt, writer), interval
        self.number = _next_number(store, run, stream, attempt, writer)
        """Of the segment that is written next."""
        self._lines: list[str] = []
        self._buffer_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"adaptory-{stream}", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        with self._buffer_lock:
            self._lines.append(line)

    def flush(self) -> bool:
        """Write what is buffered as one segment; on a store failure keep it for the next time. Whether all is written."""
        with self._write_lock:
            with self._buffer_lock:
                lines, self._lines = self._lines, []
            if not lines:
                return True
            try:
                run, stream, attempt, writer = self._place
                data = ("\n".join(lines) + "\n").encode(errors="replace")
                self._store.write(segment_path(run, stream, attempt, writer, self.number), data)
            except StoreError as error:
                log.warning("%s are kept back: %s", self._place[1], error)
                with self._buffer_lock:
                    self._lines = lines + self._lines
                return False
            self.number += 1
            return True

    def close(self) -> None:
        """Write the rest, trying a few times, and stop the thread."""
        self._closing.set()
        self._thread.join(timeout=30)
        for again in range(_LAST_TRIES):
            if self.flush():
                return
            time.sleep(self._interval * again)

    def _loop(self) -> None:
        while not self._closing.wait(self._interval):
            self.flush()


def _next_number(store: Store, run: str, stream: str, attempt: int, writer: str) -> int:
    names = (_NAME.search(path) for path in store.list(segments_path(run, stream)))
    mine = [n for n in names if n and (int(n["attempt"]), n["writer"]) == (attempt, writer)]
    return max((int(name["number"]) + 1 for name in mine), default=0)


def list_segments(
    store: Store, run: str, stream: str, *, attempt: int | None = None
) -> dict[tuple[int, str], list[str]]:
    """Paths of a run's segments by (attempt, writer), each writer's in order; attempts in their order."""
    found: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for path in store.list(segments_path(run, stream)):
        name = _NAME.search(path)
        if name and attempt in (None, int(name["attempt"])):
            found.setdefault((int(name["attempt"]), name["writer"]), []).append((int(name["number"]), path))
    return {key: [path for _, path in sorted(found[key])] for key in sorted(found)}


def read_segment(store: Store, path: str, kind: type[Line]) -> Iterator[Line]:
    """The lines of one segment; one that cannot be read is passed over with a warning, since the others still count."""
    for number, line in enumerate(store.read(path).splitlines(), 1):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            log.warning("%s:%d is not a line of %s: %s", path, number, kind.__name__, str(error).splitlines()[0])
