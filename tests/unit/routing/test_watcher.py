"""A change reaches a gateway within two seconds, and no request sees half of one. On both kinds of database."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from orchestrator.db import Database, counters
from orchestrator.db.models import CounterRow, RouteRow
from orchestrator.errors import DatabaseError
from orchestrator.routing.repository import Route
from orchestrator.routing.table import RouteTable, build_table
from orchestrator.routing.watcher import INTERVAL, RouteWatcher

BASES = {"tiny": "sha256:" + "b1" * 32}


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def one(version: str) -> list[dict[str, Any]]:
    return [{"adapter": f"acme/intents@{version}"}]


@pytest.fixture
def build(db: Database, registry: Any, tenants: None) -> Callable[[], RouteTable]:
    return functools.partial(build_table, db, registry, BASES)


def until(met: Callable[[], bool], seconds: float) -> None:
    began = time.monotonic()
    while not met():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.01)


def test_it_rebuilds_only_when_something_has_changed(
    db: Database, set_route: Callable[..., Route], registry: Any, build: Callable[[], RouteTable]
):
    set_route(adapters=one("1"))
    watcher = RouteWatcher(db, build)
    assert watcher.refresh()
    first = watcher.table
    assert not watcher.refresh()
    assert watcher.table is first
    set_route(adapters=one("2"))
    assert watcher.refresh()
    assert (first.resolve("acme", "acme/intents").adapter, watcher.table.resolve("acme", "acme/intents").adapter) == (
        digest(2),
        digest(3),
    )
    registry.has("acme/intents@2", 42)
    with db.write() as session:  # what moving an alias does
        counters.advance(session, counters.ROUTING)
    assert watcher.refresh()
    assert watcher.table.resolve("acme", "acme/intents").adapter == digest(42)
    assert watcher.refresh(force=True)


CHANGE = """
import sys
from orchestrator.db import open_database
from orchestrator.names import QualifiedName
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import get_route, save_route
db, name = open_database(sys.argv[1]), QualifiedName("acme", "intents")
config = parse_config(name, {"adapters": [{"adapter": "acme/intents@2"}]})
input("ready\\n")
save_route(db, name, config, actor="other", expected=get_route(db, name).revision)
print("saved", flush=True)
"""


def test_another_processs_change_arrives_within_two_seconds(
    db: Database, database_url: str, set_route: Callable[..., Route], build: Callable[[], RouteTable]
):
    """About two seconds. Counted from before the other process saves it."""
    set_route(adapters=one("1"))
    with RouteWatcher(db, build) as watcher:
        other = subprocess.Popen(
            [sys.executable, "-c", CHANGE, database_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        assert watcher.table.resolve("acme", "acme/intents").adapter == digest(2)
        other.stdin.write("\n")
        other.stdin.flush()
        until(lambda: watcher.table.resolve("acme", "acme/intents").adapter == digest(3), 20)
        assert INTERVAL < 1, "a change would not be there within two seconds"
        assert other.stdout.readline() == "saved\n"
        other.stdin.close()
        other.stdout.close()
        assert other.wait(30) == 0


def test_requests_see_one_table_or_the_next_and_never_neither(
    db: Database, set_route: Callable[..., Route], build: Callable[[], RouteTable]
):
    """Requests without a pause while the route changes 12 times: each gets what one of the revisions says, none goes back."""
    set_route(adapters=one("1"), defaults={"sampling": {"seed": 1}})
    seen, failed, done = [], [], threading.Event()

    def ask(watcher: RouteWatcher) -> None:
        last = 0
        try:
            while not done.is_set():
                target = watcher.table.resolve("acme", "acme/intents", "ada")
                assert target.revision is not None
                assert target.defaults.sampling.seed == target.revision, "half of one revision, half of another"
                assert target.adapter == digest(2 + (target.revision + 1) % 2)
                assert target.revision >= last
                last = target.revision
                seen.append(last)
                time.sleep(0.0005)
        except BaseException as error:
            failed.append(error)

    with RouteWatcher(db, build, interval=0.01) as watcher:
        threads = [threading.Thread(target=ask, args=(watcher,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(2, 14):
            set_route(adapters=one("12"[(number + 1) % 2]), defaults={"sampling": {"seed": number}})
            time.sleep(0.03)
        until(lambda: watcher.table.resolve("acme", "acme/intents").revision == 13, 20)
        until(lambda: 13 in seen or bool(failed), 20)
        done.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert len(set(seen)) > 2


def test_while_the_database_is_away_the_last_table_serves(
    db: Database, set_route: Callable[..., Route], registry: Any, build: Any, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    set_route(adapters=one("1"))
    with RouteWatcher(db, build, interval=0.02) as watcher:
        registry.broken = DatabaseError("It is away.")
        set_route(adapters=one("2"))
        until(lambda: "stay in force" in caplog.text, 20)
        until(lambda: watcher.age > 0.2, 20)
        assert watcher.table.resolve("acme", "acme/intents").adapter == digest(2)
        assert caplog.text.count("stay in force") == 1, "said once, not at every look"
        registry.broken = None
        until(lambda: watcher.table.resolve("acme", "acme/intents").adapter == digest(3), 20)
        until(lambda: "looked up again" in caplog.text, 20)
        until(lambda: watcher.age < 0.2, 20)


def test_a_gateway_that_cannot_know_its_routes_does_not_start(db: Database, set_route: Any, registry: Any, build: Any):
    set_route(adapters=one("1"))
    registry.broken = DatabaseError("It is away.")
    watcher = RouteWatcher(db, build)
    with pytest.raises(DatabaseError):
        watcher.start()
    watcher.stop()


def test_who_prefetches_is_told_after_the_table_is_in_force(
    db: Database, set_route: Any, build: Any, caplog: pytest.LogCaptureFixture
):
    told: list[tuple[int, frozenset[str]]] = []

    def replaced(table: RouteTable) -> None:
        assert watcher.table is table
        told.append((table.version, table.adapters()))
        raise RuntimeError("no disk")

    set_route(adapters=one("1"))
    watcher = RouteWatcher(db, build, replaced=replaced)
    watcher.refresh()
    set_route(adapters=one("2"), fallback=["acme/intents@1"])
    assert watcher.refresh()
    watcher.refresh()
    assert told == [(1, {digest(2)}), (2, {digest(2), digest(3)})]
    assert caplog.text.count("What follows a change") == 2, "what it raises is logged, and no harm to the routes"


def test_a_database_restored_from_a_backup_is_noticed(db: Database, set_route: Any, build: Any):
    """Its counter is lower than what the gateway has seen."""
    set_route(adapters=one("1"))
    set_route(adapters=one("2"))
    watcher = RouteWatcher(db, build)
    watcher.refresh()
    with db.write() as session:
        session.execute(update(CounterRow).values(value=1))
        session.execute(update(RouteRow).values(revision=1))
    assert watcher.refresh()
    assert watcher.table.resolve("acme", "acme/intents").adapter == digest(2)
