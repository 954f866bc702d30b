"""What a gateway does beside answering goes on whatever happens. About a second."""

from __future__ import annotations

import threading
import time

from serving.background import Repeated


def test_an_error_is_logged_and_the_next_call_comes(caplog):
    calls, enough = [], threading.Event()

    def fail() -> None:
        calls.append(time.monotonic())
        if len(calls) == 3:
            enough.set()
        raise RuntimeError("the database is away")

    repeated = Repeated(0.02, fail)
    assert enough.wait(10)
    repeated.close()
    assert "the database is away" in caplog.text
    count = len(calls)
    time.sleep(0.1)
    assert len(calls) == count


def test_the_last_call_comes_at_the_end():
    calls: list[str] = []
    Repeated(1000, lambda: calls.append("stored"), last=True).close()
    assert calls == ["stored"]
    Repeated(1000, lambda: calls.append("not")).close()
    assert calls == ["stored"]
