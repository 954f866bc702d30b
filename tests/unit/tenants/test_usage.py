"""Usage is added up by the hour, and a batch that is sent twice counts once. On both kinds of database."""

from __future__ import annotations

import random
import threading
import time

import pytest
from sqlalchemy import select

from orchestrator.db import Database
from orchestrator.db.models import UsageWriterRow
from orchestrator.errors import DatabaseError
from orchestrator.limits.quota import Quota
from orchestrator.tenants import usage
from orchestrator.tenants.tenant import add_tenant
from orchestrator.tenants.usage import Amount, UsageBatch, UsageKey, UsageWriter, report, store_batch

D1, D2 = ("sha256:" + digit * 64 for digit in "12")
NOON = 1_800_000_000 // 3600 * 3600


@pytest.fixture(autouse=True)
def tenants(db: Database) -> None:
    for name in ("acme", "globex"):
        add_tenant(db, name, Quota(), actor="test")


def total(db: Database) -> Amount:
    rows = report(db, by=["tenant"])
    return Amount(*(sum(row[name] for row in rows) for name in Amount._fields))


def test_added_up_by_hour_and_by_what_is_asked(db: Database):
    now = [NOON + 5.0]
    writer = UsageWriter(db, clock=lambda: now[0])
    writer.add("acme", "acme/intents", D1, tokens_in=10, tokens_out=5)
    writer.add("acme", "acme/intents", D1, tokens_in=10, tokens_out=5)
    writer.add("acme", "acme/intents", D2, tokens_in=1, tokens_out=1)
    writer.add("globex", "tiny", None, tokens_in=100, tokens_out=0)
    writer.flush()
    now[0] = NOON + 3600.0
    writer.add("acme", "acme/intents", D1, tokens_in=7, tokens_out=7)
    writer.flush()
    assert report(db) == [
        {"tenant": "globex", "route": "tiny", "adapter": "", "requests": 1, "tokens_in": 100, "tokens_out": 0},
        {"tenant": "acme", "route": "acme/intents", "adapter": D1, "requests": 3, "tokens_in": 27, "tokens_out": 17},
        {"tenant": "acme", "route": "acme/intents", "adapter": D2, "requests": 1, "tokens_in": 1, "tokens_out": 1},
    ]
    by_hour = report(db, by=["hour"], tenant="acme")
    assert [(row["hour"], row["requests"], row["tokens_in"]) for row in by_hour] == [(NOON, 3, 21), (NOON + 3600, 1, 7)]
    assert [row["hour"] for row in report(db, by=["hour"], since=NOON + 3700)] == [NOON + 3600]
    assert [row["hour"] for row in report(db, by=["hour"], until=NOON + 3600)] == [NOON]


def test_a_batch_sent_again_counts_once(db: Database):
    batches = [UsageBatch("gw", n, {UsageKey("acme", NOON, "acme/a", D1): Amount(1, 2, 3)}) for n in (1, 2)]
    assert [store_batch(db, batch) for batch in (batches[0], batches[0], batches[1], batches[0])] == [
        True,
        False,
        True,
        False,
    ]
    assert total(db) == Amount(2, 4, 6)
    other = UsageBatch("other", 1, batches[0].amounts)
    assert store_batch(db, other), "each writer counts for itself"


def test_the_same_batch_at_the_same_moment_counts_once(db: Database):
    batch = UsageBatch("gw", 1, {UsageKey("acme", NOON, f"acme/r{n}", D1): Amount(1, 1, 1) for n in range(5)})
    barrier, stored = threading.Barrier(6), []

    def store() -> None:
        barrier.wait()
        stored.append(store_batch(db, batch))

    threads = [threading.Thread(target=store) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stored) == [False] * 5 + [True]
    assert total(db) == Amount(5, 5, 5)


def test_writers_and_flushes_side_by_side_lose_nothing(db: Database):
    """3 gateways of 2 threads each, all on the same rows in an order of their own, flushing all the while."""
    writers = [UsageWriter(db) for _ in range(3)]
    routes = [f"acme/r{n}" for n in range(6)]
    failed: list[BaseException] = []

    def serve(writer: UsageWriter, seed: int) -> None:
        try:
            for number in range(60):
                writer.add("acme", random.Random(seed + number).choice(routes), D1, tokens_in=2, tokens_out=3)
                if number % 7 == 0:
                    writer.flush()
            writer.flush()
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=serve, args=(writer, 1000 * index + 100 * twin))
        for index, writer in enumerate(writers)
        for twin in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert total(db) == Amount(360, 720, 1080)


@pytest.mark.parametrize("stored_before_it_failed", [False, True])
def test_a_flush_that_fails_is_made_good_by_the_next(
    db: Database, monkeypatch: pytest.MonkeyPatch, stored_before_it_failed: bool
):
    writer, store = UsageWriter(db), usage.store_batch
    writer.add("acme", "acme/a", D1, tokens_in=1, tokens_out=1)

    def fail(db: Database, batch: UsageBatch) -> bool:
        if stored_before_it_failed:
            store(db, batch)
        raise DatabaseError("The connection was lost.")

    with monkeypatch.context() as patch:
        patch.setattr(usage, "store_batch", fail)
        for _ in range(2):
            with pytest.raises(DatabaseError):
                writer.flush()
            writer.add("acme", "acme/a", D1, tokens_in=1, tokens_out=1)
    writer.flush()
    assert total(db) == Amount(3, 3, 3)


def test_writers_long_gone_are_forgotten(db: Database, monkeypatch: pytest.MonkeyPatch):
    amounts = {UsageKey("acme", NOON, "acme/a", ""): Amount(1, 1, 1)}
    with monkeypatch.context() as patch:
        patch.setattr(usage.time, "time", lambda: 1000.0)
        store_batch(db, UsageBatch("old", 1, amounts))
    assert time.time() > 1000.0 + usage.FORGET_WRITERS
    store_batch(db, UsageBatch("new", 1, amounts))
    with db.read() as session:
        assert session.scalars(select(UsageWriterRow.writer)).all() == ["new"]
    assert total(db) == Amount(2, 2, 2)


def test_large_sums_stay_whole_numbers(db: Database):
    amounts = {UsageKey("acme", NOON, "acme/a", ""): Amount(1, 2**40, 2**40 + 1)}
    for number in range(1, 4):
        store_batch(db, UsageBatch("gw", number, amounts))
    assert total(db) == Amount(3, 3 * 2**40, 3 * 2**40 + 3)
