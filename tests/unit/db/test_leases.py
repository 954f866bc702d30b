"""Leases: one holder, expiry, renewal, release; on both kinds of database."""

from __future__ import annotations

import threading

import pytest

from orchestrator.db import Database, leases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(leases, "_now", lambda: now[0])
    return now


def test_one_holder_until_released(db: Database):
    assert leases.acquire(db, "x", "a")
    assert not leases.acquire(db, "x", "b")
    assert leases.acquire(db, "x", "a"), "its holder may take it again"
    leases.release(db, "x", "b")
    assert leases.held(db, "x"), "only the holder releases"
    leases.release(db, "x", "a")
    assert leases.acquire(db, "x", "b")


def test_it_expires(db: Database, clock: list[float]):
    assert leases.acquire(db, "x", "a", ttl=20)
    clock[0] += 19
    assert not leases.acquire(db, "x", "b")
    clock[0] += 2
    assert not leases.held(db, "x")
    assert leases.acquire(db, "x", "b")
    assert not leases.acquire(db, "x", "a"), "the late holder has lost it"


def test_holding_is_exclusive_and_ends(db: Database):
    with leases.holding(db, "x") as first, leases.holding(db, "x") as second:
        assert (first, second) == (True, False)
    assert not leases.held(db, "x")


def test_holding_waits_for_the_other(db: Database):
    leases.acquire(db, "x", "a")
    threading.Timer(0.3, leases.release, (db, "x", "a")).start()
    with leases.holding(db, "x", wait=30) as got:
        assert got


def test_a_living_holder_renews(db: Database, clock: list[float]):
    with leases.holding(db, "x", ttl=0.2):
        renewed = threading.Event()
        clock[0] += 1000  # expired, unless the thread renews it

        def watch() -> None:
            while not leases.held(db, "x"):
                pass
            renewed.set()

        threading.Thread(target=watch, daemon=True).start()
        assert renewed.wait(30)


def test_one_of_many_threads_wins(db: Database):
    won: list[int] = []
    barrier = threading.Barrier(8)

    def compete(number: int) -> None:
        barrier.wait()
        if leases.acquire(db, "x", f"h{number}"):
            won.append(number)

    threads = [threading.Thread(target=compete, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
