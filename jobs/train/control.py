"""What the control plane asks of a running job, and whether the job still owns its run."""

from __future__ import annotations

import threading

from jobs.train.fence import check_still_ours
from orchestrator.errors import ObjectMissing, StoreError, Superseded
from orchestrator.store import Store, control_path


class Control:
    """Looks at the store every second from a thread of its own; the loop asks `wish` between steps.

    A store that is away changes nothing: the run goes on.
    """

    def __init__(self, store: Store, run: str, attempt: int, *, interval: float = 1.0):
        self._store, self._run, self._attempt, self._interval = store, run, attempt, interval
        self.wish: str | None = None
        """`pause`, `cancel`, or None."""
        self._closing = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._loop, name="adaptory-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def _loop(self) -> None:
        while not self._closing.wait(self._interval):
            self._look()

    def _look(self) -> None:
        try:
            check_still_ours(self._store, self._run, self._attempt)
            self.wish = self._store.read_json(control_path(self._run, self._attempt)).get("action") or self.wish
        except Superseded:
            self.wish = "cancel"
        except (ObjectMissing, StoreError):
            return
