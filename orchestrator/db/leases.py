"""Leases: who may do something alone for a while. They live in the database, since stores differ in conditional writes.

A holder that dies loses its lease when the time is over; one that lives renews it from a thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.db.database import Database
from orchestrator.db.models import LeaseRow
from orchestrator.errors import DatabaseError

TTL = 20.0
"""Seconds that a lease lives without being renewed."""


def new_holder() -> str:
    """A name for one use of a lease; says who to look for when it seems stuck."""
    return f"{socket.gethostname()[:60]}:{os.getpid()}:{uuid.uuid4().hex[:12]}"


def take(session: Session, name: str, holder: str, *, ttl: float = TTL) -> bool:
    """Take a lease that is free, expired or already `holder`'s, as a part of the caller's transaction."""
    row = session.scalar(select(LeaseRow).where(LeaseRow.name == name).with_for_update())
    if row is None:
        session.add(LeaseRow(name=name, holder=holder, expires_at=_now() + ttl))
        session.flush()
        return True
    if row.holder != holder and row.expires_at > _now():
        return False
    row.holder, row.expires_at = holder, _now() + ttl
    return True


def acquire(db: Database, name: str, holder: str, *, ttl: float = TTL) -> bool:
    """Whether `holder` has the lease now."""
    try:
        with db.write() as session:
            return take(session, name, holder, ttl=ttl)
    except IntegrityError:  # PostgreSQL: somebody inserted it at the same moment
        return False


def release(db: Database, name: str, holder: str) -> None:
    with db.write() as session:
        session.execute(delete(LeaseRow).where(LeaseRow.name == name, LeaseRow.holder == holder))


def held(db: Database, name: str) -> bool:
    """Whether somebody holds the lease now."""
    with db.read() as session:
        return (
            session.scalar(select(LeaseRow.name).where(LeaseRow.name == name, LeaseRow.expires_at > _now())) is not None
        )


@contextlib.contextmanager
def holding(db: Database, name: str, *, wait: float = 0.0, ttl: float = TTL) -> Iterator[bool]:
    """Hold a lease for the block, waiting up to `wait` seconds for it; yields whether it was got."""
    holder, deadline = new_holder(), time.monotonic() + wait
    while not (got := acquire(db, name, holder, ttl=ttl)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not got:
        yield False
        return
    with renewing(db, name, holder, ttl=ttl):
        yield True


@contextlib.contextmanager
def renewing(db: Database, name: str, holder: str, *, ttl: float = TTL) -> Iterator[None]:
    """Renew a lease that `holder` has already, from a thread, and release it at the end."""
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(db, name, holder, ttl, done), name="adaptory-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(DatabaseError):  # it expires by itself
            release(db, name, holder)


def _renew(db: Database, name: str, holder: str, ttl: float, done: threading.Event) -> None:
    while not done.wait(ttl / 4):
        with contextlib.suppress(DatabaseError), db.write() as session:
            session.execute(
                update(LeaseRow).where(LeaseRow.name == name, LeaseRow.holder == holder).values(expires_at=_now() + ttl)
            )


def _now() -> float:
    return time.time()
