"""What a gateway does now and then beside answering: each on a thread of its own, none of which ever ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Repeated:
    """Calls a function every so many seconds until it is closed; an error is logged, and the next call comes as usual.

    Args:
        last: call it once more at the end.
    """

    def __init__(self, seconds: float, function: Callable[[], None], *, last: bool = False):
        self._seconds, self._function, self._last = seconds, function, last
        self._closing = threading.Event()
        name = getattr(function, "__qualname__", "repeated")
        self._thread = threading.Thread(target=self._run, name=f"adaptory-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._call()
        if self._last:
            self._call()

    def _call(self) -> None:
        try:
            self._function()
        except Exception:
            log.exception("%s failed; it is tried again in %g s", self._thread.name, self._seconds)
