"""The audit trail: who changed which alias, route, key or tenant, and when. Written with the change, in one transaction."""

from __future__ import annotations

import getpass
import os
import socket
import time
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.db.database import Database
from orchestrator.db.models import AuditRow


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)

    seq: int
    created_at: float
    """Seconds since the epoch."""
    actor: str
    action: str
    """`<kind>.<verb>`, such as `alias.move`."""
    subject: str
    """What was changed, as a person names it, such as `acme/intents@production`."""
    before: Any
    """None: it was not there."""
    after: Any
    """None: it is gone."""


def record(session: Session, actor: str, action: str, subject: str, before: Any, after: Any) -> None:
    """Add an entry as a part of the caller's transaction. The values are JSON, and never hold a secret."""
    row = AuditRow(
        created_at=time.time(), actor=actor[:120], action=action, subject=subject, before=before, after=after
    )
    session.add(row)
    session.flush()


def entries(
    db: Database, *, subject: str | None = None, prefix: str | None = None, limit: int | None = None
) -> list[Entry]:
    """Newest first.

    Args:
        subject: only what happened to exactly this.
        prefix: only what happened to subjects that begin so.
    """
    query = select(AuditRow).order_by(AuditRow.seq.desc())
    if subject is not None:
        query = query.where(AuditRow.subject == subject)
    if prefix is not None:
        query = query.where(AuditRow.subject.startswith(prefix, autoescape=True))
    with db.read() as session:
        return [Entry.model_validate(row) for row in session.scalars(query.limit(limit))]


def person() -> str:
    """Who runs this process, as far as the machine knows: `ada@laptop`."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in /etc/passwd
        name = f"uid-{os.getuid()}"
    return f"{name}@{socket.gethostname()}"[:120]
