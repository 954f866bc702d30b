"""Both limiters keep the same promises, and the shared one keeps them over threads, processes and a gateway's death."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db import Database, open_database
from orchestrator.limits.buckets import Refused
from orchestrator.limits.limiter import Limiter, LocalLimiter, Reservation
from orchestrator.limits.quota import Quota
from orchestrator.limits.shared import SharedLimiter
from orchestrator.tenants.tenant import add_tenant

ONE_AT_A_TIME = Quota(concurrent_requests=1)


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


def add_tenants(db: Database) -> None:
    for name in ("acme", "globex"):
        add_tenant(db, name, Quota(), actor="test")


@pytest.fixture
def tenants(db: Database) -> None:
    add_tenants(db)


@pytest.fixture(params=["local", "shared-sqlite", "shared-postgresql"])
def limiter(request: pytest.FixtureRequest, tmp_path: Path, clock: list[float]) -> Iterator[Limiter]:
    if request.param == "local":
        yield LocalLimiter(clock=lambda: clock[0])
        return
    sqlite = request.param == "shared-sqlite"
    db = open_database(f"sqlite:///{tmp_path / 'state.db'}" if sqlite else request.getfixturevalue("postgres"))
    add_tenants(db)
    yield SharedLimiter(db, clock=lambda: clock[0])
    db.close()


def test_reserve_and_settle(limiter: Limiter, clock: list[float]):
    quota = Quota(tokens_per_minute=600)
    first = limiter.reserve("acme", quota, 600)
    assert isinstance(first, Reservation)
    assert limiter.reserve("acme", quota, 100) == Refused("tokens_per_minute", 600, 10.0)
    assert isinstance(limiter.reserve("globex", quota, 600), Reservation), "tenants do not share"
    limiter.settle(first, 450)
    second = limiter.reserve("acme", quota, 150)
    assert isinstance(second, Reservation)
    limiter.settle(second, 750)
    assert limiter.reserve("acme", quota, 60) == Refused("tokens_per_minute", 600, 66.0)
    clock[0] += 66
    assert isinstance(limiter.reserve("acme", quota, 60), Reservation)


def test_a_place_is_held_until_the_end(limiter: Limiter):
    for end in (lambda place: limiter.settle(place, 3), limiter.cancel):
        place = limiter.reserve("acme", ONE_AT_A_TIME, 5)
        assert isinstance(place, Reservation)
        refused = limiter.reserve("acme", ONE_AT_A_TIME, 5)
        assert isinstance(refused, Refused)
        assert refused.limit == "concurrent_requests"
        end(place)


def test_ending_twice_changes_nothing(limiter: Limiter):
    quota = Quota(tokens_per_minute=100, concurrent_requests=1)
    first = limiter.reserve("acme", quota, 50)
    assert isinstance(first, Reservation)
    limiter.settle(first, 50)
    second = limiter.reserve("acme", quota, 50)
    assert isinstance(second, Reservation)
    for _ in range(3):
        limiter.settle(first, 0)
        limiter.cancel(first)
    assert isinstance(limiter.reserve("acme", quota, 0), Refused), "the second one's place is still taken"
    limiter.settle(second, 50)
    assert limiter.reserve("acme", quota, 50) == Refused("tokens_per_minute", 100, 30.0)


def test_what_never_began_costs_nothing(limiter: Limiter):
    quota = Quota(requests_per_minute=1, tokens_per_minute=10)
    for _ in range(5):
        place = limiter.reserve("acme", quota, 10)
        assert isinstance(place, Reservation)
        limiter.cancel(place)
    place = limiter.reserve("acme", quota, 10)
    assert isinstance(place, Reservation)
    limiter.settle(place, 0)
    assert limiter.reserve("acme", quota, 1) == Refused("requests_per_minute", 1, 60.0), "what ran counts as a request"


def test_what_is_refused_costs_nothing(limiter: Limiter):
    quota = Quota(requests_per_minute=2, tokens_per_minute=10)
    for _ in range(5):
        assert isinstance(limiter.reserve("acme", quota, 11), Refused)
    assert isinstance(limiter.reserve("acme", quota, 10), Reservation)


def test_threads_together_get_exactly_the_limit(limiter: Limiter):
    """8 threads race for 20 requests and never hold more than 3 places; the clock stands still."""
    quota = Quota(requests_per_minute=20, concurrent_requests=3)
    held, most, got = [0], [0], []
    guard, barrier = threading.Lock(), threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        for _ in range(30):
            place = limiter.reserve("acme", quota, 1)
            if isinstance(place, Reservation):
                with guard:
                    held[0] += 1
                    most[0] = max(most[0], held[0])
                    got.append(place.id)
                    held[0] -= 1
                limiter.settle(place, 1)

    run_all(ask, 8)
    while isinstance(place := limiter.reserve("acme", quota, 1), Reservation):  # those that only places had held back
        got.append(place.id)
        limiter.settle(place, 1)
    assert len(got) == len(set(got)) == 20
    assert most[0] <= 3


def test_threads_never_hold_more_than_the_places(limiter: Limiter):
    quota, got, barrier = Quota(concurrent_requests=5), [], threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        for _ in range(4):
            place = limiter.reserve("acme", quota, 1)
            if isinstance(place, Reservation):
                got.append(place)

    run_all(ask, 8)
    assert len(got) == 5
    for place in got:
        limiter.settle(place, 1)
    assert isinstance(limiter.reserve("acme", quota, 1), Reservation)


def run_all(work: Callable[[], None], count: int) -> None:
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# --- several gateways -----------------------------------------------------------------------------------------------


def _gateway(arguments: tuple[str, dict[str, Any]]) -> tuple[int, int]:
    """One gateway's life: asks 25 times and settles; returns how many it got by then and the tokens they used."""
    url, quota = arguments
    db = open_database(url)
    limiter, got = SharedLimiter(db, clock=lambda: 1000.0), 0
    for _ in range(25):
        place = limiter.reserve("acme", Quota(**quota), 10)
        if isinstance(place, Reservation):
            got += 1
            limiter.settle(place, 5)
    db.close()
    return got, got * 5


def test_processes_together_get_exactly_the_limit(database_url: str, db: Database, tenants: None):
    quota = {"tokens_per_minute": 205}
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        counts = pool.map(_gateway, [(database_url, quota)] * 3)
    # 10 are reserved and 5 used, so the last that fits begins at 195; with up to two others reserved beside it, earlier.
    assert 175 <= sum(used for _, used in counts) <= 205
    left = SharedLimiter(db, clock=lambda: 1000.0).reserve(
        "acme", Quota(**quota), 206 - sum(used for _, used in counts)
    )
    assert isinstance(left, Refused), "what every process used is in the books"


def test_a_dead_gateways_places_come_back(db: Database, tenants: None, clock: list[float]):
    dead, alive = (SharedLimiter(db, ttl=30, clock=lambda: clock[0]) for _ in range(2))
    assert isinstance(dead.reserve("acme", ONE_AT_A_TIME, 5), Reservation)
    clock[0] += 29
    assert isinstance(alive.reserve("acme", ONE_AT_A_TIME, 5), Refused)
    clock[0] += 2
    mine = alive.reserve("acme", ONE_AT_A_TIME, 5)
    assert isinstance(mine, Reservation)
    for _ in range(4):  # a long answer of a living gateway keeps its place
        clock[0] += 20
        alive.renew()
    assert isinstance(dead.reserve("acme", ONE_AT_A_TIME, 5), Refused)
    alive.settle(mine, 5)
    assert isinstance(dead.reserve("acme", ONE_AT_A_TIME, 5), Reservation)


def test_a_gateway_whose_clock_is_behind_gives_nothing_extra(db: Database, tenants: None):
    quota = Quota(requests_per_minute=60)
    ahead, behind = SharedLimiter(db, clock=lambda: 1000.0), SharedLimiter(db, clock=lambda: 990.0)
    for number in range(60):
        assert isinstance((ahead, behind)[number % 2].reserve("acme", quota, 1), Reservation)
    for limiter in (behind, ahead, behind, ahead):
        assert isinstance(limiter.reserve("acme", quota, 1), Refused)
