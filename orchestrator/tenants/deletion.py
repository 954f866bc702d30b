"""Deleting a tenant: only one that owns nothing, so that nothing is lost by a word.

Adapters and runs are never deleted: a version's number means one digest for ever, and lineage leads from traffic back to
data. Who has some can be disabled.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import and_, delete, func, select
from sqlalchemy.orm import Session

from orchestrator.db import Database
from orchestrator.db.models import (
    AdapterRow,
    AdapterVersionRow,
    ApiKeyRow,
    LimitRow,
    ReservationRow,
    RouteRevisionRow,
    RouteRow,
    RunRow,
    TenantRow,
    UsageRow,
)
from orchestrator.errors import TenantInUse
from orchestrator.tenants.audit import changed
from orchestrator.tenants.tenant import Tenant, tenant_of, tenant_row

_PARTS = (RouteRevisionRow, RouteRow, ApiKeyRow, LimitRow, ReservationRow, UsageRow)
"""What goes with it, each before what it refers to: deleted routes, ended keys, drained limits."""


def delete_tenant(db: Database, name: str, *, actor: str, forget_usage: bool = False) -> Tenant:
    """Delete a tenant that has no routes, no keys in use, no adapters and no runs; its name is free again.

    Args:
        forget_usage: also one that has used something; otherwise what it used stays on record, and the tenant with it.

    Raises:
        TenantNotFound
        TenantInUse: says what it owns.
    """
    with db.write() as session:
        row = tenant_row(session, name, lock=True)
        tenant, owns = tenant_of(row), _owned(session, name)
        used = owns.pop("hours of usage", 0)
        if used and not forget_usage:
            owns["hours of usage"] = used
        if owns:
            raise _in_use(name, owns)
        for part in _PARTS:
            session.execute(delete(part).where(part.tenant == name))
        session.execute(delete(TenantRow).where(TenantRow.name == name))
        before = {"quota": tenant.quota.model_dump(), "created_at": tenant.created_at, "hours_of_usage": used}
        changed(session, actor, "tenant.delete", name, before=before)
        return tenant


def _owned(session: Session, name: str) -> dict[str, int]:
    """How many there are of each kind of which there are any."""
    now = time.time()
    in_use = and_(ApiKeyRow.revoked_at.is_(None), func.coalesce(ApiKeyRow.expires_at, now + 1) > now)
    kinds: dict[str, tuple[Any, Any]] = {
        "routes": (RouteRow, RouteRow.revision > 0),
        "keys": (ApiKeyRow, in_use),
        "adapters": (AdapterRow, True),
        "versions of adapters": (AdapterVersionRow, True),
        "runs": (RunRow, True),
        "requests being answered": (ReservationRow, ReservationRow.expires_at > now),
        "hours of usage": (UsageRow, True),
    }
    counts = {
        kind: session.scalar(select(func.count()).select_from(table).where(table.tenant == name, which)) or 0
        for kind, (table, which) in kinds.items()
    }
    return {kind: count for kind, count in counts.items() if count}


def _in_use(name: str, owns: dict[str, int]) -> TenantInUse:
    said = ", ".join(f"{kind} ({count})" for kind, count in owns.items())
    for_ever = owns.keys() & {"adapters", "versions of adapters", "runs"}
    steps = {
        "routes": "`adaptory routes delete`",
        "keys": "`adaptory keys revoke`",
        "hours of usage": "`--forget-usage`",
    }
    needed = ", ".join(step for kind, step in steps.items() if kind in owns)
    instead = f"`adaptory tenants disable {name}` refuses its keys at once and keeps everything"
    hint = (
        f"Adapters and runs are kept for ever, and so is their tenant: {instead}."
        if for_ever or not needed
        else f"First {needed}; or {instead}."
    )
    return TenantInUse(f"Tenant {name} owns {said}.", hint=hint, tenant=name, owns=owns)
