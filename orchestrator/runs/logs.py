"""A job's log lines: through the store as events are, so that they outlive the cluster."""

from __future__ import annotations

import contextlib
import heapq
import logging
import re
from collections.abc import Iterable, Iterator
from datetime import datetime

from pydantic import BaseModel

from orchestrator.runs.segments import SegmentWriter, list_segments, read_segment
from orchestrator.store import Store

_OUR_OWN = ("orchestrator.runs.segments", "botocore", "aiobotocore", "s3fs", "fsspec", "urllib3")
"""Loggers that speak while a segment is written: a segment about them would write the next, for ever."""


class LogLine(BaseModel):
    time: float
    """Seconds since the epoch."""
    writer: str
    level: str
    message: str


class StoreLogHandler(logging.Handler):
    """Sends a process's log records to the store. Close it (or `logging.shutdown()`) to write the last lines.

    Args:
        writer: distinguishes the processes of one attempt, e.g. `driver`, `rank0`.
        interval: seconds between segments.
    """

    def __init__(self, store: Store, run: str, attempt: int, writer: str, *, interval: float = 1.0):
        super().__init__()
        self._writer, self._segments = writer, SegmentWriter(store, run, "logs", attempt, writer, interval=interval)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(_OUR_OWN):
            return
        try:
            line = LogLine(
                time=record.created, writer=self._writer, level=record.levelname.lower(), message=self.format(record)
            )
            self._segments.append(line.model_dump_json())
        except Exception:  # logging's own rule: a record that cannot be written never raises
            self.handleError(record)

    def flush(self) -> None:
        """Nothing: the thread writes each `interval`. `logging` calls this too often for a store."""

    def close(self) -> None:
        self._segments.close()
        super().close()


def read_logs(store: Store, run: str, *, attempt: int | None = None, seen: set[str] | None = None) -> Iterator[LogLine]:
    """Log lines of a run, or of one attempt, merged by time; segments named in `seen` are skipped, and those read are
    added to it, so that calling again gives what is new."""
    writers = list_segments(store, run, "logs", attempt=attempt).values()
    yield from heapq.merge(*(_lines(store, paths, seen) for paths in writers), key=lambda line: line.time)


def printed_lines(text: str, *, since: float) -> Iterator[LogLine]:
    """What Ray kept of a job's output. Each line has the time that it begins with, else that of the line before it.

    Args:
        since: seconds since the epoch, for lines before the first that says its time.
    """
    for line in text.splitlines():
        if stamp := _STAMP.match(line):
            with contextlib.suppress(ValueError):
                since = datetime.fromisoformat(stamp[1].replace(",", ".")).timestamp()
        yield LogLine(time=since, writer="ray", level="info", message=line)


_STAMP = re.compile(r"\W{0,2}(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d{3})?)")
"""As Python's and Ray's loggers begin their lines, in the node's own time zone."""


def _lines(store: Store, paths: Iterable[str], seen: set[str] | None) -> Iterator[LogLine]:
    for path in paths:
        if seen is not None and path in seen:
            continue
        yield from read_segment(store, path, LogLine)
        if seen is not None:
            seen.add(path)
