"""Who changed which tenant, key or route, and when: every change of these three passes through here, once."""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy.orm import Session

log = logging.getLogger(__name__)


def changed(session: Session, actor: str, action: str, subject: str, *, before: Any = None, after: Any = None) -> None:
    """Put a change on record, as a part of the transaction that makes it.

    Args:
        action: `key.revoke`, `route.set`, …
        subject: the thing's public name: `acme`, `acme/intents`, a key's id.
        before, after: JSON-able facts of it; never a key or its hash.
    """
    # The append-only table is a concern of the registry; `session` is what its `record` takes.
    log.info("%s: %s %s: %s -> %s", actor, action, subject, before, after)
