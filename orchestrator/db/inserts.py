"""Inserts that meet a row which is there already. SQLite and PostgreSQL say it alike, but SQLAlchemy has one class for each."""

from __future__ import annotations

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from orchestrator.db.models import Base


def insert(session: Session, table: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """An insert of the session's dialect, with `on_conflict_do_update` and `on_conflict_do_nothing`."""
    kind = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    return kind(table)


def insert_or_ignore(session: Session, table: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """An insert that leaves a row which is already there as it is."""
    return insert(session, table).on_conflict_do_nothing()
