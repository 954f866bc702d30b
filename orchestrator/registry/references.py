"""From what a person writes for an adapter to its digest: the database's names first, the store's after them."""

from __future__ import annotations

import re

from orchestrator.db import Database
from orchestrator.errors import AdapterError
from orchestrator.registry.adapters import resolve_adapter
from orchestrator.registry.versions import find_version, list_versions, parse_reference
from orchestrator.store import Store


def resolve(db: Database, store: Store, text: str, *, tenant: str) -> str:
    """
    Args:
        text: `acme/intents@production`, `@3` or `@sha256:…`; `acme/intents` or `intents` (its newest version); a digest or its
            first six or more digits; or a run's id or name.
        tenant: whose name it is when the text has an `@` and no tenant.

    Raises:
        AdapterError: it means nothing, or more than one adapter.
    """
    if "@" in text:
        return find_version(db, parse_reference(text, tenant)).digest
    if not re.fullmatch(r"(sha256:)?[0-9a-f]{6,64}", text):
        owner, _, name = text.rpartition("/")
        versions = list_versions(db, tenant=owner or None, name=name)
        owners = sorted({version.tenant for version in versions})
        if len(owners) > 1:
            raise AdapterError(
                f"{text!r} names adapters of {len(owners)} tenants: {', '.join(f'{o}/{name}' for o in owners[:5])}.",
                hint="Write one of them.",
                adapter=text,
            )
        if versions:
            return versions[0].digest
    return resolve_adapter(store, text)
