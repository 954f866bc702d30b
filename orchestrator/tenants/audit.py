"""Who changed which tenant, key or route, and when: every change of these three passes through here, once."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from orchestrator.db.audit import record


def changed(session: Session, actor: str, action: str, subject: str, *, before: Any = None, after: Any = None) -> None:
    """Put a change on record, as a part of the transaction that makes it.

    Args:
        action: `key.revoke`, `route.set`, …
        subject: the thing's public name: `acme`, `acme/intents`, a key's id.
        before, after: JSON-able facts of it; never a key or its hash.
    """
    record(session, actor, action, subject, before, after)
