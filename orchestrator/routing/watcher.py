"""Keeps a gateway's route table up to date: reads one number every half second, and rebuilds only when it has changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from orchestrator.db import Database, counters
from orchestrator.routing.table import RouteTable

log = logging.getLogger(__name__)

INTERVAL = 0.5
"""Seconds between two looks; with the time of a rebuild this keeps a change well within two seconds."""


class RouteWatcher:
    """Holds the newest table; reading `table` takes no lock. While the database is away the last one stays in force.

    Args:
        build: makes the table of this moment; called on the watcher's thread, and once by `start`.
        replaced: told of each new table after it is in force (prefetch what it names); what it raises is logged.
    """

    def __init__(
        self,
        db: Database,
        build: Callable[[], RouteTable],
        *,
        interval: float = INTERVAL,
        replaced: Callable[[RouteTable], None] | None = None,
    ):
        self._db, self._build, self._interval, self._replaced = db, build, interval, replaced
        self._table: RouteTable | None = None
        self._done, self._rebuilding = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._seen_at = 0.0
        self._failing = False

    @property
    def table(self) -> RouteTable:
        assert self._table is not None, "the watcher is not started"
        return self._table

    @property
    def age(self) -> float:
        """Seconds since the table was last known to be the newest."""
        return time.monotonic() - self._seen_at

    def start(self) -> None:
        """Build the first table and begin to watch.

        Raises:
            AdaptoryError: it cannot be built: a gateway that knows no route must not start.
        """
        self.refresh(force=True)
        self._thread = threading.Thread(target=self._watch, name="adaptory-routes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> RouteWatcher:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def refresh(self, *, force: bool = False) -> bool:
        """Look now; whether the table was replaced. `force`: even if no route has changed (other bases are served, say).

        Raises:
            AdaptoryError: it could not be looked or built; the last table stays.
        """
        with self._rebuilding:
            looked = time.monotonic()
            with self._db.read() as session:
                version = counters.current(session, counters.ROUTING)
            # Any other number, not only a higher one: a database that was restored from a backup counts from there.
            replace = force or self._table is None or version != self._table.version
            if replace:
                self._table = self._build()
            self._seen_at = looked
            if replace and self._replaced is not None:
                try:
                    self._replaced(self._table)  # type: ignore[arg-type]
                except Exception:
                    log.exception("What follows a change of routes has failed; the routes themselves are in force.")
            return replace

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            try:
                self.refresh()
            except Exception as error:  # whatever it is, the next look may succeed, and the last table serves meanwhile
                if not self._failing:
                    log.warning("Routes cannot be looked up, so the last known ones stay in force: %s", error)
                self._failing = True
            else:
                if self._failing:
                    log.warning("Routes are looked up again.")
                self._failing = False
