"""Tenants in the database. Every function is one transaction."""

from __future__ import annotations

import difflib
import time

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.db import Database
from orchestrator.db.inserts import insert_or_ignore
from orchestrator.db.models import TenantRow
from orchestrator.errors import TenantExists, TenantNotFound
from orchestrator.limits.quota import Quota
from orchestrator.names import check_name, cut, is_name, shown
from orchestrator.tenants.audit import changed


class Tenant(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    quota: Quota
    created_at: float
    """Seconds since the epoch."""
    disabled_at: float | None = None
    """Since when its keys are refused; None while they are not."""


def list_tenants(db: Database) -> list[Tenant]:
    """By name."""
    with db.read() as session:
        return [tenant_of(row) for row in session.scalars(select(TenantRow).order_by(TenantRow.name))]


def get_tenant(db: Database, name: str) -> Tenant:
    """
    Raises:
        TenantNotFound: names the nearest.
    """
    with db.read() as session:
        return tenant_of(tenant_row(session, name))


def add_tenant(db: Database, name: str, quota: Quota, *, actor: str) -> Tenant:
    """
    Raises:
        InvalidName, TenantExists
    """
    check_name(name, "tenant")
    with db.write() as session:
        row = _new(session, name, quota)
        if row is None:
            raise TenantExists(
                f"There is a tenant {name} already.",
                hint=f"`adaptory tenants set {name}` changes its quotas; a run of a new tenant's also adds it.",
                tenant=name,
            )
        changed(session, actor, "tenant.add", name, after=quota.model_dump())
        return tenant_of(row)


def ensure_tenant(db: Database, name: str, *, actor: str) -> Tenant:
    """The tenant, made without quotas if it is new.

    Raises:
        InvalidName
    """
    check_name(name, "tenant")
    with db.write() as session:
        if (row := _new(session, name, Quota())) is not None:
            changed(session, actor, "tenant.add", name, after=Quota().model_dump())
        return tenant_of(row or tenant_row(session, name))


def set_quota(db: Database, name: str, changes: dict[str, int | None], *, actor: str) -> Tenant:
    """Change some of a tenant's limits; they hold from the next request on.

    Args:
        changes: limit → number, or None for without limit.

    Raises:
        TenantNotFound
    """
    with db.write() as session:
        row = tenant_row(session, name, lock=True)
        before = tenant_of(row).quota
        after = Quota.model_validate(before.model_dump() | changes)
        if after != before:
            for limit, value in after:
                setattr(row, limit, value)
            changed(session, actor, "tenant.set", name, before=before.model_dump(), after=after.model_dump())
        return tenant_of(row)


def disable_tenant(db: Database, name: str, *, actor: str) -> Tenant:
    """Refuse the tenant's keys from the next request on; nothing else of it changes. Again changes nothing.

    Raises:
        TenantNotFound
    """
    return _switch(db, name, time.time(), "tenant.disable", actor)


def enable_tenant(db: Database, name: str, *, actor: str) -> Tenant:
    """Undo `disable_tenant`: those of its keys that are valid by themselves work again.

    Raises:
        TenantNotFound
    """
    return _switch(db, name, None, "tenant.enable", actor)


def _switch(db: Database, name: str, disabled_at: float | None, action: str, actor: str) -> Tenant:
    with db.write() as session:
        row = tenant_row(session, name, lock=True)
        before = row.disabled_at
        if (before is None) != (disabled_at is None):
            row.disabled_at = disabled_at
            changed(session, actor, action, name, before={"disabled_at": before}, after={"disabled_at": disabled_at})
        return tenant_of(row)


def tenant_row(session: Session, name: str, *, lock: bool = False) -> TenantRow:
    """
    Raises:
        TenantNotFound: names the nearest.
    """
    if is_name(name):  # what is none may be a key, typed in the wrong place: it does not reach the log of the database
        query = select(TenantRow).where(TenantRow.name == name)
        row = session.scalar(query.with_for_update() if lock else query)
        if row is not None:
            return row
    near = difflib.get_close_matches(cut(name), session.scalars(select(TenantRow.name)).all(), n=1)
    hint = (
        f"Did you mean {near[0]}?" if near else "`adaptory tenants list` shows all, `adaptory tenants add` makes one."
    )
    raise TenantNotFound(f"There is no tenant {shown(name)}.", hint=hint, tenant=cut(name))


def tenant_of(row: TenantRow) -> Tenant:
    limits = {limit: getattr(row, limit) for limit in Quota.model_fields}
    return Tenant(name=row.name, quota=Quota(**limits), created_at=row.created_at, disabled_at=row.disabled_at)


def _new(session: Session, name: str, quota: Quota) -> TenantRow | None:
    values = {"name": name, "created_at": time.time(), **quota.model_dump()}
    return session.scalar(insert_or_ignore(session, TenantRow).values(**values).returning(TenantRow))
