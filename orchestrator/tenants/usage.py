"""Usage: requests and tokens per tenant, route, adapter and hour. Gateways add up in memory and store batches.

A batch has its writer's name and a number that counts up. It is stored in one transaction together with that number, so that
one whose answer was lost can be sent again and counts once. What a gateway had not yet stored when it was killed is lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import delete, func, select

from orchestrator.db import Database
from orchestrator.db.inserts import insert
from orchestrator.db.leases import new_holder
from orchestrator.db.models import TenantRow, UsageRow, UsageWriterRow

HOUR = 3600
FORGET_WRITERS = 30 * 24 * HOUR
"""Seconds after which a writer that stores nothing any more is forgotten; none retries for that long."""

By = Literal["tenant", "route", "adapter", "hour"]


class UsageKey(NamedTuple):
    tenant: str
    hour: int
    """Its beginning, in seconds since the epoch."""
    route: str
    """The model's public name."""
    adapter: str
    """Digest; empty when the base answered."""


class Amount(NamedTuple):
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def plus(self, other: Amount) -> Amount:
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class UsageBatch:
    writer: str
    number: int
    """Counts up from 1 for each writer."""
    amounts: dict[UsageKey, Amount]


class UsageWriter:
    """Adds up what one gateway process serves. `add` never waits for the database; who owns it calls `flush` now and then."""

    def __init__(self, db: Database, *, writer: str | None = None, clock: Callable[[], float] = time.time):
        self._db, self._writer, self._clock = db, writer or new_holder(), clock
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._amounts: dict[UsageKey, Amount] = {}
        self._unsaved: UsageBatch | None = None
        self._number = 0

    def add(self, tenant: str, route: str, adapter: str | None, *, tokens_in: int, tokens_out: int) -> None:
        """One request that has ended, with what it used."""
        key = UsageKey(tenant, int(self._clock()) // HOUR * HOUR, route, adapter or "")
        with self._lock:
            self._amounts[key] = self._amounts.get(key, Amount()).plus(Amount(1, tokens_in, tokens_out))

    def flush(self) -> None:
        """Store what was added. When it fails, nothing is lost: the same batch is sent again by the next call.

        Raises:
            DatabaseError
        """
        with self._flushing:
            while True:
                if self._unsaved is None:
                    with self._lock:
                        amounts, self._amounts = self._amounts, {}
                    if not amounts:
                        return
                    self._number += 1
                    self._unsaved = UsageBatch(self._writer, self._number, amounts)
                store_batch(self._db, self._unsaved)
                self._unsaved = None


def store_batch(db: Database, batch: UsageBatch) -> bool:
    """Add a batch to what is stored; False when it was there already.

    Raises:
        DatabaseError
    """
    now = time.time()
    with db.write() as session:
        count = insert(session, UsageWriterRow).values(writer=batch.writer, batch=batch.number, written_at=now)
        count = count.on_conflict_do_update(
            index_elements=["writer"],
            set_={"batch": batch.number, "written_at": now},
            where=UsageWriterRow.batch < batch.number,
        )
        if session.scalar(count.returning(UsageWriterRow.batch)) is None:
            return False
        if batch.number == 1:
            session.execute(delete(UsageWriterRow).where(UsageWriterRow.written_at < now - FORGET_WRITERS))
        there = set(
            session.scalars(select(TenantRow.name).where(TenantRow.name.in_({k.tenant for k in batch.amounts})))
        )
        for key, amount in sorted(batch.amounts.items()):  # one order for all writers, so that none waits in a circle
            if key.tenant not in there:  # deleted while it was answered: nobody is left to charge
                continue
            add = insert(session, UsageRow).values(**key._asdict(), **amount._asdict())
            more = {name: getattr(UsageRow, name) + value for name, value in amount._asdict().items()}
            session.execute(add.on_conflict_do_update(index_elements=list(UsageKey._fields), set_=more))
        return True


def report(
    db: Database,
    *,
    by: Sequence[By] = ("tenant", "route", "adapter"),
    tenant: str | None = None,
    since: float | None = None,
    until: float | None = None,
) -> list[dict[str, Any]]:
    """What was used, added up by some of tenant, route, adapter and hour; the most tokens first, or by hour.

    Args:
        since, until: seconds since the epoch; whole hours that begin in [since's hour, until).

    Returns:
        rows with the fields of `by` and `requests`, `tokens_in`, `tokens_out`.
    """
    groups = [getattr(UsageRow, name) for name in by]
    sums = [func.sum(getattr(UsageRow, name)).label(name) for name in Amount._fields]
    query = select(*groups, *sums).group_by(*groups)
    if tenant is not None:
        query = query.where(UsageRow.tenant == tenant)
    if since is not None:
        query = query.where(UsageRow.hour >= int(since) // HOUR * HOUR)
    if until is not None:
        query = query.where(UsageRow.hour < until)
    with db.read() as session:
        found = [dict(row._mapping) for row in session.execute(query)]
    rows = [{name: int(value) if name in Amount._fields else value for name, value in row.items()} for row in found]
    rows.sort(key=lambda row: row["tokens_in"] + row["tokens_out"], reverse=True)
    return sorted(rows, key=lambda row: row["hour"]) if "hour" in by else rows
