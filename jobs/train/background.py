"""Writing that training does not wait for, and writing that does not give up at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.errors import StoreError, Superseded

KEEP_SECONDS = 120.0
"""That what a finished trial has trained waits for a store that does not take it."""


class Background:
    """One piece of work at a time, in a thread of its own. It deals with its errors itself, but for a newer attempt's claim."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._superseded: Superseded | None = None
        self.seconds = 0.0
        """That the last one took."""
        self.ended_at = time.monotonic()
        """When it ended, by the monotonic clock; until there is one, when this was made."""

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """After what is under way has ended. Where no thread can be had any more, training waits for the work.

        Raises:
            Superseded: a newer attempt owns the run.
        """
        self.wait()
        thread = threading.Thread(target=self._run, args=(work,), name="adaptory-writing")
        try:
            thread.start()
        except RuntimeError:  # no memory for its stack, or too many threads
            self._run(work)
            self.wait()
        else:
            self._thread = thread

    def wait(self) -> None:
        """Until what is under way has ended.

        Raises:
            Superseded: a newer attempt owns the run.
        """
        self.finish()
        if self._superseded:
            raise self._superseded

    def finish(self) -> None:
        """Let what is under way end, whatever comes of it."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            work()
        except Superseded as error:
            self._superseded = error
        finally:
            self.ended_at = time.monotonic()
            self.seconds = self.ended_at - began


def patiently(work: Callable[[], None], seconds: float, say: Callable[..., Any]) -> None:
    """Do work that may be done again, once the store takes it.

    Args:
        say: told why it has to wait, as `Session.say`.

    Raises:
        StoreError: after so many seconds it still does not.
    """
    deadline, pause = time.monotonic() + seconds, 1.0
    while True:
        try:
            return work()
        except StoreError as error:
            if time.monotonic() + pause > deadline:
                raise
            say("message", f"{error.message} It is tried again in {pause:.0f} s.", level="warn")
        time.sleep(pause)
        pause = min(2 * pause, 15.0)
