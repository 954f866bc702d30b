"""Counters that say whether something has changed, so that whoever keeps a copy of it polls one number.

`advance` belongs into the transaction of the change. Its row lock lets such changes commit one after another only: who
reads the number first and the data after it may get newer data than the number says, never older.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.db.inserts import insert
from orchestrator.db.models import CounterRow

ROUTING = "routing"
"""Everything that decides which adapter answers a request: routes, and the aliases that they name."""


def advance(session: Session, name: str) -> int:
    """Count one change, as a part of the caller's transaction; returns the new number."""
    up = insert(session, CounterRow).values(name=name, value=1)
    up = up.on_conflict_do_update(index_elements=["name"], set_={"value": CounterRow.value + 1})
    return session.execute(up.returning(CounterRow.value)).scalar_one()


def current(session: Session, name: str) -> int:
    """The number now; 0 before the first change."""
    return session.scalar(select(CounterRow.value).where(CounterRow.name == name)) or 0
