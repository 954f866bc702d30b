"""Statements that SQLite and PostgreSQL write alike and SQLAlchemy does not."""

from __future__ import annotations

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from orchestrator.db.models import Base


def insert_or_ignore(session: Session, table: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """An insert that leaves a row which is already there as it is."""
    kind = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    return kind(table).on_conflict_do_nothing()
