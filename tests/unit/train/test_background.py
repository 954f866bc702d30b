"""Writing beside training, and writing that waits for its store."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from jobs.train import background
from jobs.train.background import Background, patiently
from orchestrator.errors import StoreError, Superseded


def test_one_at_a_time_and_how_long_it_took() -> None:
    writing, go, done = Background(), threading.Event(), []
    assert not writing.busy
    writing.start(lambda: done.append(go.wait(30)))
    assert writing.busy
    threading.Timer(0.05, go.set).start()
    writing.start(lambda: done.append("second"))
    writing.wait()
    assert done == [True, "second"]
    assert not writing.busy
    assert 0 <= writing.seconds < 30


def test_a_newer_attempts_claim_is_heard_by_whoever_waits() -> None:
    def work() -> None:
        raise Superseded("Attempt 2 owns the run.")

    writing = Background()
    writing.start(work)
    writing.finish()
    with pytest.raises(Superseded):
        writing.wait()
    with pytest.raises(Superseded):
        writing.start(lambda: None)


def test_where_no_thread_can_be_had_the_work_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    writing, done = Background(), []
    writing.start(lambda: done.append(1))
    assert done == [1]
    assert not writing.busy
    writing.finish()

    def superseded() -> None:
        raise Superseded("Attempt 2 owns the run.")

    with pytest.raises(Superseded):
        writing.start(superseded)


class Store:
    """Away for the first few calls."""

    def __init__(self, away: int):
        self.away, self.took = away, 0

    def __call__(self) -> None:
        if self.away:
            self.away -= 1
            raise StoreError("The store is away.")
        self.took += 1


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, which passes at once."""
    slept: list[float] = []
    monkeypatch.setattr(background.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(background.time, "sleep", slept.append)
    return slept


def test_a_store_that_comes_back_is_waited_for(pauses: list[float]) -> None:
    store, said = Store(3), []

    def say(*words: Any, **data: Any) -> None:
        said.append(words)

    patiently(store, 60, say)
    assert store.took == 1
    assert pauses == [1.0, 2.0, 4.0]
    assert said[0] == ("message", "The store is away. It is tried again in 1 s.")


def test_one_that_stays_away_ends_it(pauses: list[float]) -> None:
    with pytest.raises(StoreError):
        patiently(Store(1000), 60, lambda *_, **__: None)
    assert 30 < sum(pauses) <= 60
