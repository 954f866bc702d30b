"""The limiter of several gateways: the same arithmetic on rows of the database, one short transaction a call.

Gateways' clocks may differ by seconds: levels drain on the fastest of them. A gateway that dies leaves its reservations
behind; they stop counting when nobody has renewed them for `ttl` seconds, and what they reserved stays used.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from orchestrator.db import Database
from orchestrator.db.inserts import insert_or_ignore
from orchestrator.db.leases import new_holder
from orchestrator.db.models import LimitRow, ReservationRow
from orchestrator.limits.buckets import Buckets, Refused
from orchestrator.limits.limiter import Reservation
from orchestrator.limits.quota import Quota

TTL = 30.0
"""Seconds that a reservation lives without being renewed."""


class SharedLimiter:
    """One for each gateway process. Its owner calls `renew` every `ttl / 3` seconds."""

    waits = True

    def __init__(
        self, db: Database, *, holder: str | None = None, ttl: float = TTL, clock: Callable[[], float] = time.time
    ):
        self._db, self._holder, self._ttl, self._clock = db, holder or new_holder(), ttl, clock

    def reserve(self, tenant: str, quota: Quota, estimated_tokens: int) -> Reservation | Refused:
        with self._db.write() as session:
            buckets = _locked(session, tenant).drained(quota, now := self._clock())
            session.execute(
                delete(ReservationRow).where(ReservationRow.tenant == tenant, ReservationRow.expires_at <= now)
            )
            alive = select(func.count()).select_from(ReservationRow).where(ReservationRow.tenant == tenant)
            taken = buckets.reserve(quota, estimated_tokens, session.scalar(alive) or 0)
            if isinstance(taken, Refused):
                return taken
            reservation = Reservation(tenant, quota, estimated_tokens)
            expires = now + self._ttl
            session.add(ReservationRow(id=reservation.id, tenant=tenant, holder=self._holder, expires_at=expires))
            _save(session, tenant, taken)
            return reservation

    def settle(self, reservation: Reservation, actual_tokens: int) -> None:
        self._end(reservation, tokens=actual_tokens - reservation.tokens)

    def cancel(self, reservation: Reservation) -> None:
        self._end(reservation, tokens=-reservation.tokens, requests=-1)

    def renew(self) -> None:
        """Keep all of this gateway's reservations alive; one statement, however many they are."""
        with self._db.write() as session:
            session.execute(
                update(ReservationRow)
                .where(ReservationRow.holder == self._holder)
                .values(expires_at=self._clock() + self._ttl)
            )

    def _end(self, reservation: Reservation, *, tokens: int, requests: int = 0) -> None:
        with self._db.write() as session:
            buckets = _locked(session, reservation.tenant)
            gone = delete(ReservationRow).where(ReservationRow.id == reservation.id).returning(ReservationRow.id)
            if session.scalar(gone) is None:
                return
            drained = buckets.drained(reservation.quota, self._clock())
            _save(session, reservation.tenant, drained.correct(requests=requests, tokens=tokens))


def _locked(session: Session, tenant: str) -> Buckets:
    """The tenant's levels; its row stays locked until the transaction ends, and is always the first one that is."""
    query = select(LimitRow).where(LimitRow.tenant == tenant).with_for_update()
    row = session.scalar(query)
    if row is None:
        session.execute(insert_or_ignore(session, LimitRow).values(tenant=tenant, requests=0.0, tokens=0.0, at=0.0))
        row = session.scalars(query).one()
    return Buckets(row.requests, row.tokens, row.at)


def _save(session: Session, tenant: str, buckets: Buckets) -> None:
    values = {"requests": buckets.requests, "tokens": buckets.tokens, "at": buckets.at}
    session.execute(update(LimitRow).where(LimitRow.tenant == tenant).values(**values))
