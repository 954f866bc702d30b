"""API keys: made, rotated, revoked, and asked for at each request. The database holds their hashes only."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import bindparam, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.db import Database
from orchestrator.db.models import ApiKeyRow, TenantRow
from orchestrator.errors import ApiKeyError, ApiKeyExists, ApiKeyNotFound, ApiKeyRefused, ScopeMissing
from orchestrator.names import check_name, is_name, shown
from orchestrator.tenants import secrets
from orchestrator.tenants.audit import changed
from orchestrator.tenants.tenant import Tenant, tenant_of, tenant_row


class Scope(StrEnum):
    INFERENCE = "inference"
    """Ask models."""
    ADMIN = "admin"
    """Change what belongs to the key's tenant."""


class KeyState(StrEnum):
    ACTIVE = "active"
    ROTATED = "rotated"
    """Replaced, and valid until its grace period ends."""
    EXPIRED = "expired"
    REVOKED = "revoked"


class ApiKey(BaseModel):
    """A key as everybody may see it."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    id: str
    tenant: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    created_by: str
    expires_at: float | None
    revoked_at: float | None
    replaced_by: str | None
    """Id of the key that took its place."""

    def state(self, now: float | None = None) -> KeyState:
        if self.revoked_at is not None:
            return KeyState.REVOKED
        if self.expires_at is not None and self.expires_at <= (time.time() if now is None else now):
            return KeyState.EXPIRED
        return KeyState.ROTATED if self.replaced_by else KeyState.ACTIVE

    @property
    def prefix(self) -> str:
        """How it begins; enough to recognise it by."""
        return f"ak-{self.id}"


@dataclass(frozen=True)
class IssuedKey:
    """A new key, on its way to the one person who may see it."""

    key: ApiKey
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a tenant, by one of its keys."""

    tenant: Tenant
    key_id: str
    key_name: str
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """
        Raises:
            ScopeMissing
        """
        if scope not in self.scopes:
            raise ScopeMissing(
                f"The key {self.key_name} is not for {scope.value}.",
                hint=f"Use one that is: `adaptory keys create --tenant {self.tenant.name} --scope {scope.value}`.",
                scope=scope.value,
                key=self.key_id,
            )


# --- at each request ------------------------------------------------------------------------------------------------


def authenticate(db: Database, presented: str) -> Principal:
    """Who has this key. One query by primary key, so that a revoked key, a disabled tenant and a changed quota count from the
    next request on.

    Raises:
        ApiKeyRefused: it is no valid key. Only who holds the whole key learns that it has expired or was revoked, or that
            its tenant is disabled.
    """
    if not secrets.is_key(presented):
        raise _refused("This is no API key.")
    with db.read() as session:
        found = session.execute(_BY_ID, {"id": secrets.key_id(presented)}).one_or_none()
        if not secrets.matches(presented, found[0].hash if found else None) or found is None:
            raise _refused("This API key is not known.")
        key, tenant = ApiKey.model_validate(found[0]), tenant_of(found[1])
    if (state := key.state()) in (KeyState.EXPIRED, KeyState.REVOKED):
        ended = "has expired" if state is KeyState.EXPIRED else "was revoked"
        raise _refused(f"The API key {key.prefix}… {ended}.", key=key.id)
    if tenant.disabled_at is not None:
        raise ApiKeyRefused(
            f"The tenant {tenant.name} is disabled.", hint="Ask whoever runs this endpoint.", key=key.id
        )
    return Principal(tenant, key.id, key.name, frozenset(key.scopes))


_BY_ID = (
    select(ApiKeyRow, TenantRow)
    .join(TenantRow, TenantRow.name == ApiKeyRow.tenant)
    .where(ApiKeyRow.id == bindparam("id"))
)
"""Built once: a third of the time of a query is in that."""


def _refused(message: str, **context: Any) -> ApiKeyRefused:
    return ApiKeyRefused(message, hint="`adaptory keys create` makes one.", **context)


# --- by hand --------------------------------------------------------------------------------------------------------


def list_keys(db: Database, *, tenant: str | None = None) -> list[ApiKey]:
    """Oldest first.

    Raises:
        TenantNotFound
    """
    query = select(ApiKeyRow).order_by(ApiKeyRow.tenant, ApiKeyRow.created_at, ApiKeyRow.id)
    with db.read() as session:
        if tenant is not None:
            tenant_row(session, tenant)
            query = query.where(ApiKeyRow.tenant == tenant)
        return [ApiKey.model_validate(row) for row in session.scalars(query)]


def create_key(
    db: Database,
    tenant: str,
    name: str,
    *,
    actor: str,
    scopes: Collection[Scope] = (Scope.INFERENCE,),
    lifetime: float | None = None,
) -> IssuedKey:
    """A new key; its secret is in what this returns and nowhere else.

    Args:
        lifetime: seconds until it expires; None: never.

    Raises:
        InvalidName, TenantNotFound
        ApiKeyExists: the tenant uses a key of this name.
    """
    check_name(name, "key")
    now = time.time()
    try:
        with db.write() as session:
            tenant_row(session, tenant)
            expires = None if lifetime is None else now + lifetime
            issued = _issue(session, tenant, name, scopes, created_at=now, expires_at=expires, actor=actor)
            changed(session, actor, "key.create", issued.key.id, after=issued.key.model_dump(mode="json"))
            return issued
    except IntegrityError as error:
        raise ApiKeyExists(
            f"Tenant {tenant} has a key {name} already.",
            hint="Choose another name; or `adaptory keys rotate` replaces it, `adaptory keys revoke` ends it.",
            tenant=tenant,
            name=name,
        ) from error


def rotate_key(
    db: Database, reference: str, *, actor: str, grace: float, tenant: str | None = None, lifetime: float | None = None
) -> IssuedKey:
    """A new key of the same name and scopes; the old one goes on working for `grace` seconds, unless it ends earlier.

    Args:
        lifetime: seconds until the new one expires; None: as long as the old one had been made for.

    Raises:
        TenantNotFound, ApiKeyNotFound
        ApiKeyError: it was revoked, or rotated already.
    """
    now = time.time()
    with db.write() as session:
        row = _find(session, reference, tenant)
        before = ApiKey.model_validate(row)
        if row.revoked_at is not None or row.replaced_by is not None:
            done = "revoked" if row.revoked_at is not None else f"replaced by ak-{row.replaced_by}"
            hint = "Rotate the one that replaced it." if row.replaced_by else "`adaptory keys create` makes a new one."
            raise ApiKeyError(f"The key {before.prefix} ({row.name}) was {done} already.", hint=hint, key=row.id)
        if lifetime is None and row.expires_at is not None:
            lifetime = row.expires_at - row.created_at
        key_id, secret = secrets.new_key()
        row.replaced_by = key_id  # first, so that the name is free for the new one
        row.expires_at = now + grace if row.expires_at is None else min(row.expires_at, now + grace)
        session.flush()
        expires = None if lifetime is None else now + lifetime
        issued = _issue(
            session,
            row.tenant,
            row.name,
            before.scopes,
            created_at=now,
            expires_at=expires,
            actor=actor,
            made=(key_id, secret),
        )
        changed(
            session,
            actor,
            "key.rotate",
            row.id,
            before=before.model_dump(mode="json"),
            after={
                "old": ApiKey.model_validate(row).model_dump(mode="json"),
                "new": issued.key.model_dump(mode="json"),
            },
        )
        return issued


def revoke_key(db: Database, reference: str, *, actor: str, tenant: str | None = None) -> ApiKey:
    """End a key now. Revoking it again changes nothing.

    Raises:
        TenantNotFound, ApiKeyNotFound
    """
    with db.write() as session:
        row = _find(session, reference, tenant)
        before = ApiKey.model_validate(row)
        if row.revoked_at is None:
            row.revoked_at = time.time()
            after = ApiKey.model_validate(row).model_dump(mode="json")
            changed(session, actor, "key.revoke", row.id, before=before.model_dump(mode="json"), after=after)
        return ApiKey.model_validate(row)


# --- details --------------------------------------------------------------------------------------------------------


def _issue(
    session: Session,
    tenant: str,
    name: str,
    scopes: Collection[Scope],
    *,
    created_at: float,
    expires_at: float | None,
    actor: str,
    made: tuple[str, str] | None = None,
) -> IssuedKey:
    key_id, secret = made or secrets.new_key()
    row = ApiKeyRow(
        id=key_id,
        tenant=tenant,
        name=name,
        hash=secrets.hash_key(secret),
        scopes=sorted({scope.value for scope in scopes}),
        created_at=created_at,
        created_by=actor[:120],
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    return IssuedKey(ApiKey.model_validate(row), secret)


def _find(session: Session, reference: str, tenant: str | None) -> ApiKeyRow:
    """The key with this id (or the whole key, which is not repeated), or the one in use with this name.

    Raises:
        TenantNotFound, ApiKeyNotFound
    """
    query = select(ApiKeyRow).with_for_update()
    if tenant is not None:
        tenant_row(session, tenant)
        query = query.where(ApiKeyRow.tenant == tenant)
    if (key_id := secrets.key_id(reference)) and (row := session.scalar(query.where(ApiKeyRow.id == key_id))):
        return row
    in_use = query.where(ApiKeyRow.name == reference, ApiKeyRow.revoked_at.is_(None), ApiKeyRow.replaced_by.is_(None))
    rows = session.scalars(in_use).all() if is_name(reference) else []  # a key's secret is none
    if len(rows) == 1:
        return rows[0]
    if rows:
        which = ", ".join(f"ak-{row.id} (tenant {row.tenant})" for row in rows)
        raise ApiKeyNotFound(f"Several tenants have a key {reference}.", hint=f"Name its tenant or its id: {which}.")
    raise ApiKeyNotFound(
        f"There is no key {shown(reference)} in use{f' of tenant {tenant}' if tenant else ''}.",
        hint="`adaptory keys list` shows all: name one by its id or its name.",
    )
