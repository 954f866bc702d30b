"""Routes in the database. A change writes a new revision and moves the route to it by compare-and-swap; none is ever edited,
and a route that is deleted keeps its own, so that it can be brought back.

Every function is one transaction, and every change advances the counter by which gateways notice.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.db import Database, counters
from orchestrator.db.models import RouteRevisionRow, RouteRow
from orchestrator.errors import RouteConflict, RouteInvalid, RouteNotFound
from orchestrator.names import AdapterReference, QualifiedName
from orchestrator.routing.adapters import ResolvedAdapter, Resolver
from orchestrator.routing.config import RouteConfig
from orchestrator.tenants.audit import changed
from orchestrator.tenants.tenant import tenant_row


class Route(BaseModel):
    """A route at one of its revisions."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    tenant: str
    name: str
    revision: int
    config: dict[str, Any]
    """A RouteConfig, as JSON: kept readable even when a later version would refuse it."""
    restores: int | None
    """The revision that a rollback brought back."""
    created_at: float
    created_by: str
    """When and by whom this revision was set."""

    @property
    def public_name(self) -> QualifiedName:
        return QualifiedName(self.tenant, self.name)


_CURRENT = select(RouteRevisionRow).join(
    RouteRow,
    (RouteRow.tenant == RouteRevisionRow.tenant)
    & (RouteRow.name == RouteRevisionRow.name)
    & (RouteRow.revision == RouteRevisionRow.revision),
)


# --- reading --------------------------------------------------------------------------------------------------------


def list_routes(db: Database, *, tenant: str | None = None) -> list[Route]:
    """By name.

    Raises:
        TenantNotFound
    """
    with db.read() as session:
        if tenant is not None:
            tenant_row(session, tenant)
        return current_routes(session, tenant=tenant)


def current_routes(session: Session, *, tenant: str | None = None) -> list[Route]:
    query = _CURRENT.order_by(RouteRevisionRow.tenant, RouteRevisionRow.name)
    if tenant is not None:
        query = query.where(RouteRevisionRow.tenant == tenant)
    return [Route.model_validate(row) for row in session.scalars(query)]


def find_route(db: Database, name: QualifiedName) -> Route | None:
    with db.read() as session:
        return _find(session, name)


def get_route(db: Database, name: QualifiedName) -> Route:
    """
    Raises:
        RouteNotFound: names the nearest of the same tenant's.
    """
    with db.read() as session:
        return _find(session, name) or _missing(session, name)


def list_revisions(db: Database, name: QualifiedName) -> list[Route]:
    """Newest first.

    Raises:
        RouteNotFound
    """
    query = select(RouteRevisionRow).where(*_named(RouteRevisionRow, name)).order_by(RouteRevisionRow.revision.desc())
    with db.read() as session:
        _find(session, name) or _missing(session, name)
        return [Route.model_validate(row) for row in session.scalars(query)]


# --- changing -------------------------------------------------------------------------------------------------------


def save_route(
    db: Database,
    name: QualifiedName,
    config: RouteConfig,
    *,
    actor: str,
    expected: int,
    resolver: Resolver | None = None,
) -> Route:
    """Set what a route says, from the next request that a gateway sees after noticing; saying the same again changes nothing.

    Args:
        expected: the revision that the change was made from; 0: the route is new.
        resolver: when given, every adapter that the route names must exist, and all of them belong to one base.

    Raises:
        TenantNotFound
        RouteInvalid: it names an adapter that does not exist, or one of another base than its other adapters'.
        RouteConflict: somebody else has changed it meanwhile.
    """
    if resolver is not None and config.references:
        with db.read() as session:
            tenant_row(session, name.tenant)  # of a tenant that is none, nothing exists: that is the mistake
        _check_adapters(name, config.references, resolver(config.references))
    return _move(db, name, config.model_dump(mode="json"), actor=actor, expected=expected)


def rollback(db: Database, name: QualifiedName, *, actor: str, to: int | None = None) -> Route:
    """Bring back what an earlier revision said, as a new revision.

    Args:
        to: which; None: the one before that which is in force, so that a second rollback goes back further; of a route that
            was deleted, the last.

    Raises:
        RouteNotFound: there is no such route or revision.
        RouteConflict: somebody else has changed it meanwhile.
    """
    with db.read() as session:
        now, last = _find(session, name), _last_revision(session, name)
        if not last:
            _missing(session, name)
        back = (now.restores or now.revision) - 1 if now else last
        wanted = back if to is None else to
        query = select(RouteRevisionRow).where(*_named(RouteRevisionRow, name), RouteRevisionRow.revision == wanted)
        row = session.scalar(query)
        if row is None:
            raise RouteNotFound(
                f"Route {name} has no revision {wanted}.",
                hint=f"`adaptory routes show {name}` lists those that it has.",
                route=str(name),
                revision=wanted,
            )
        config, source = row.config, row.restores or row.revision
    return _move(db, name, config, actor=actor, expected=now.revision if now else 0, restores=source)


def delete_route(db: Database, name: QualifiedName, *, actor: str, expected: int | None = None) -> Route:
    """Take a route away, which requests notice as they notice a change; returns what it said. `rollback` brings it back.

    Args:
        expected: only if this revision is in force; None: whichever is.

    Raises:
        RouteNotFound
        RouteConflict: another revision is in force.
    """
    with db.write() as session:
        before = _find(session, name) or _missing(session, name)
        gone = update(RouteRow).where(*_named(RouteRow, name), RouteRow.revision == before.revision)
        if expected not in (None, before.revision) or (
            session.scalar(gone.values(revision=0).returning(RouteRow.name)) is None
        ):
            raise _conflict(name, _find(session, name))
        counters.advance(session, counters.ROUTING)
        changed(session, actor, "route.delete", str(name), before=_said(before))
        return before


def _move(
    db: Database, name: QualifiedName, config: dict[str, Any], *, actor: str, expected: int, restores: int | None = None
) -> Route:
    now = time.time()
    try:
        with db.write() as session:
            tenant_row(session, name.tenant)
            before = _find(session, name)
            if (before.revision if before else 0) != expected:
                raise _conflict(name, before)
            if before is not None and before.config == config:
                return before
            revision = (last := _last_revision(session, name)) + 1
            if not last:
                session.add(RouteRow(tenant=name.tenant, name=name.name, revision=revision, created_at=now))
                session.flush()
            else:
                swap = update(RouteRow).where(*_named(RouteRow, name), RouteRow.revision == expected)
                if session.scalar(swap.values(revision=revision).returning(RouteRow.revision)) is None:
                    raise _conflict(name, _find(session, name))
            row = RouteRevisionRow(
                tenant=name.tenant,
                name=name.name,
                revision=revision,
                config=config,
                restores=restores,
                created_at=now,
                created_by=actor[:120],
            )
            session.add(row)
            session.flush()
            counters.advance(session, counters.ROUTING)
            after = Route.model_validate(row)
            action = "route.set" if restores is None else "route.rollback"
            changed(session, actor, action, str(name), before=before and _said(before), after=_said(after))
            return after
    except IntegrityError as error:  # PostgreSQL: two have made it at the same moment
        raise _conflict(name, find_route(db, name)) from error


def _said(route: Route) -> dict[str, Any]:
    return {"revision": route.revision, "restores": route.restores, "config": route.config}


# --- details --------------------------------------------------------------------------------------------------------


def _check_adapters(
    name: QualifiedName,
    references: Sequence[AdapterReference],
    found: Mapping[AdapterReference, ResolvedAdapter],
) -> None:
    """
    Raises:
        RouteInvalid
    """
    missing = [str(reference) for reference in references if reference not in found]
    if missing:
        raise RouteInvalid(
            f"Route {name} names what does not exist: {', '.join(missing)}.",
            hint=f"`adaptory adapters versions --tenant {name.tenant}` shows what there is.",
            route=str(name),
            value=missing[0],
        )
    first = references[0]
    for reference in references[1:]:
        if (other := found[reference].base_digest) != (base := found[first].base_digest):
            raise RouteInvalid(
                f"Route {name} cannot use {reference}: it was trained on the base model {other[:19]}…, and {first} on "
                f"{base[:19]}….",
                hint="All adapters of a route share one base model: make a route for each.",
                route=str(name),
                value=str(reference),
            )


def _named(table: type[RouteRow] | type[RouteRevisionRow], name: QualifiedName) -> tuple[Any, Any]:
    return table.tenant == name.tenant, table.name == name.name


def _find(session: Session, name: QualifiedName) -> Route | None:
    row = session.scalar(_CURRENT.where(*_named(RouteRow, name)))
    return Route.model_validate(row) if row else None


def _last_revision(session: Session, name: QualifiedName) -> int:
    """Also of a route that was deleted; 0 of one that never was."""
    return session.scalar(select(func.max(RouteRevisionRow.revision)).where(*_named(RouteRevisionRow, name))) or 0


def _missing(session: Session, name: QualifiedName) -> Route:
    """
    Raises:
        RouteNotFound: always.
    """
    if _last_revision(session, name):
        hint = f"It was deleted: `adaptory routes rollback {name}` brings it back."
        raise RouteNotFound(f"There is no route {name}.", hint=hint, route=str(name))
    query = select(RouteRow.name).where(RouteRow.tenant == name.tenant, RouteRow.revision > 0)
    near = difflib.get_close_matches(name.name, session.scalars(query).all(), n=1)
    hint = f"Did you mean {name.tenant}/{near[0]}?" if near else f"`adaptory routes set {name}` makes it."
    raise RouteNotFound(f"There is no route {name}.", hint=hint, route=str(name))


def _conflict(name: QualifiedName, now: Route | None) -> RouteConflict:
    said = f"{now.created_by} has set revision {now.revision}" if now else "it is gone"
    return RouteConflict(
        f"Route {name} was changed meanwhile: {said}.",
        hint=f"`adaptory routes show {name}` shows what it says now; then repeat yours.",
        route=str(name),
        revision=now.revision if now else None,
    )
