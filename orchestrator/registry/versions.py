"""Numbered versions of adapters under a tenant's name, and aliases that move between them.

`acme/intents@3` is one digest for ever; `acme/intents@production` is the version that the alias names now. An alias moves
by compare-and-swap in the database, and each move is in the audit trail.
"""

from __future__ import annotations

import difflib
import re
import time
from typing import Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.db import Database, audit, counters
from orchestrator.db.inserts import insert_or_ignore
from orchestrator.db.models import AdapterAliasRow, AdapterVersionRow, AuditRow, TenantRow
from orchestrator.errors import AdapterError, AdapterNotFound, AliasMoved

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,61}[a-z0-9]|[a-z0-9]")  # as the names of runs and tenants in a job spec
_ALIAS = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")  # never a number, and no `sha256:…`
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{6,64}")


class Reference(BaseModel):
    """What a person writes for one version: `acme/intents@production`, `acme/intents@3`, `acme/intents@sha256:…`."""

    model_config = ConfigDict(frozen=True)

    tenant: str
    name: str
    selector: str | None = None
    """What stands behind the `@`: an alias, a number, or a digest or its first digits; None without one."""

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}" + (f"@{self.selector}" if self.selector else "")


class AdapterVersion(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)

    tenant: str
    name: str
    number: int
    digest: str
    run_id: str | None
    """None for an adapter that was trained elsewhere."""
    created_at: float
    """Seconds since the epoch."""
    created_by: str
    aliases: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        return f"{self.tenant}/{self.name}@{self.number}"


def parse_reference(text: str, tenant: str) -> Reference:
    """
    Args:
        tenant: whose name it is when the text does not say.

    Raises:
        AdapterError: it has another form. What leads out of a directory never gets beyond here.
    """
    whole, at, selector = text.partition("@")
    owner, slash, name = whole.rpartition("/")
    owner = owner if slash else tenant
    known = _NUMBER.fullmatch(selector) or _ALIAS.fullmatch(selector) or _DIGEST.fullmatch(selector)
    if not _NAME.fullmatch(owner) or not _NAME.fullmatch(name) or (at and not known):
        raise AdapterError(
            f"{text!r} is no name of an adapter.",
            hint="Write TENANT/NAME@VERSION, as in acme/intents@3, acme/intents@production or acme/intents@sha256:…; names are "
            "lower-case letters, digits and hyphens.",
            adapter=text,
            check="name",
        )
    return Reference(tenant=owner, name=name, selector=selector or None)


# --- versions -------------------------------------------------------------------------------------------------------


def register(
    session: Session, tenant: str, name: str, digest: str, *, actor: str, run_id: str | None = None
) -> AdapterVersion:
    """The version of this name with this digest: the one that is there, else the next, in the caller's transaction."""
    # The tenant's row is locked, so that two that register at once on PostgreSQL do not take the same number.
    session.execute(insert_or_ignore(session, TenantRow).values(name=tenant, created_at=time.time()))
    session.execute(select(TenantRow.name).where(TenantRow.name == tenant).with_for_update())
    mine = (AdapterVersionRow.tenant == tenant, AdapterVersionRow.name == name)
    row = session.scalar(select(AdapterVersionRow).where(*mine, AdapterVersionRow.digest == digest))
    if row is None:
        last = session.scalar(select(func.max(AdapterVersionRow.number)).where(*mine)) or 0
        row = AdapterVersionRow(
            tenant=tenant,
            name=name,
            number=last + 1,
            digest=digest,
            run_id=run_id,
            created_at=time.time(),
            created_by=actor,
        )
        session.add(row)
        session.flush()
        audit.record(session, actor, "adapter.register", f"{tenant}/{name}@{row.number}", None, {"digest": digest})
        counters.advance(session, counters.ROUTING)  # a route may have named it before it was there
    return AdapterVersion.model_validate(row)


def list_versions(
    db: Database, *, tenant: str | None = None, name: str | None = None, digest: str | None = None
) -> list[AdapterVersion]:
    """With the aliases that name each now; by name, newest first."""
    query = select(AdapterVersionRow)
    for column, value in (
        (AdapterVersionRow.tenant, tenant),
        (AdapterVersionRow.name, name),
        (AdapterVersionRow.digest, digest),
    ):
        if value is not None:
            query = query.where(column == value)
    query = query.order_by(AdapterVersionRow.tenant, AdapterVersionRow.name, AdapterVersionRow.number.desc())
    with db.read() as session:
        return _with_aliases(session, list(session.scalars(query)))


def find_version(db: Database, reference: Reference) -> AdapterVersion:
    """The version that a reference means; without a selector, the newest.

    Raises:
        AdapterNotFound: there is none.
        AdapterError: the first digits of a digest fit several.
    """
    selector = reference.selector
    versions = list_versions(db, tenant=reference.tenant, name=reference.name)
    if selector is None:
        found = versions[:1]
    elif _NUMBER.fullmatch(selector):
        found = [version for version in versions if version.number == int(selector)]
    elif selector.startswith("sha256:"):
        found = [version for version in versions if version.digest.startswith(selector)]
    else:
        found = [version for version in versions if selector in version.aliases]
    if len(found) > 1:
        fitting = ", ".join(version.reference for version in found[:5])
        raise AdapterError(f"{reference} fits {fitting}.", hint="Write one of them.", adapter=str(reference))
    if not found:
        raise _not_found(db, reference, versions)
    return found[0]


# --- aliases --------------------------------------------------------------------------------------------------------


class AliasMove(BaseModel):
    """What `move_alias` did."""

    alias: str
    """`acme/intents@production`."""
    before: int | None
    """Version it named; None: there was no such alias."""
    after: int

    @property
    def moved(self) -> bool:
        return self.before != self.after


def move_alias(
    db: Database, version: AdapterVersion, alias: str, *, actor: str, expect: int | Literal["any"] = "any"
) -> AliasMove:
    """Let an alias name this version, by compare-and-swap; one that does already is left as it is.

    Args:
        expect: move it only if it names this version now; 0: only if there is no such alias. `any`: wherever it stands.

    Raises:
        AdapterError: that cannot be an alias.
        AdapterNotFound: there is no such version.
        AliasMoved: it stands elsewhere than expected.
    """
    if not _ALIAS.fullmatch(alias):
        raise AdapterError(
            f"{alias!r} cannot be an alias.",
            hint="Write lower-case letters, digits and hyphens, beginning with a letter, such as production.",
            check="name",
        )
    try:
        return _move(db, version, alias, actor, expect)
    except IntegrityError:  # PostgreSQL: there was no row yet to wait for, and somebody made it meanwhile
        return _move(db, version, alias, actor, expect)


def _move(db: Database, version: AdapterVersion, alias: str, actor: str, expect: int | Literal["any"]) -> AliasMove:
    subject = f"{version.tenant}/{version.name}@{alias}"
    this = {"tenant": version.tenant, "name": version.name, "alias": alias}
    where = [getattr(AdapterAliasRow, column) == value for column, value in this.items()]
    with db.write() as session:
        if session.get(AdapterVersionRow, (version.tenant, version.name, version.number)) is None:
            raise AdapterNotFound(f"There is no adapter {version.reference}.", adapter=version.reference)
        # SQLite has the only write lock already; PostgreSQL waits here for whoever moves the alias now.
        before = session.scalar(select(AdapterAliasRow.number).where(*where).with_for_update())
        if expect != "any" and (before or 0) != expect:
            raise _moved(subject, expect, before)
        if before != version.number:
            values = {"number": version.number, "updated_at": time.time()}
            if before is None:
                session.add(AdapterAliasRow(**this, **values))
                session.flush()
            else:
                session.execute(update(AdapterAliasRow).where(*where).values(**values))
            audit.record(session, actor, "alias.move", subject, before, version.number)
            session.execute(update(AdapterAliasRow).where(*where).values(previous=_previous(session, subject)))
            counters.advance(session, counters.ROUTING)
    return AliasMove(alias=subject, before=before, after=version.number)


def _previous(session: Session, alias: str) -> int | None:
    """The version that the alias named before it came to its present one. Going back to a version forgets what came after
    it: nobody wants to fall back to what was just taken out of service."""
    moves = select(AuditRow.before, AuditRow.after).where(AuditRow.subject == alias, AuditRow.action == "alias.move")
    way: list[int] = []
    for before, after in session.execute(moves.order_by(AuditRow.seq)):
        way = [] if before is None else way  # a new life under an old name
        way = [*way[: way.index(after)], after] if after in way else [*way, after]
    return way[-2] if len(way) > 1 else None


def history(db: Database, reference: Reference, *, limit: int | None = None) -> list[audit.Entry]:
    """All that happened to a name's versions and aliases, or to one of them; newest first."""
    if reference.selector:
        return audit.entries(db, subject=str(reference), limit=limit)
    return audit.entries(db, prefix=f"{reference}@", limit=limit)


# --- details --------------------------------------------------------------------------------------------------------


def _with_aliases(session: Session, rows: list[AdapterVersionRow]) -> list[AdapterVersion]:
    names = {(row.tenant, row.name) for row in rows}
    found: dict[tuple[str, str, int], list[str]] = {}
    query = select(AdapterAliasRow).order_by(AdapterAliasRow.alias)
    if len(names) == 1:
        ((tenant, name),) = names
        query = query.where(AdapterAliasRow.tenant == tenant, AdapterAliasRow.name == name)
    for alias in session.scalars(query) if rows else ():
        found.setdefault((alias.tenant, alias.name, alias.number), []).append(alias.alias)
    return [
        AdapterVersion.model_validate(row).model_copy(
            update={"aliases": tuple(found.get((row.tenant, row.name, row.number), ()))}
        )
        for row in rows
    ]


def _not_found(db: Database, reference: Reference, versions: list[AdapterVersion]) -> AdapterNotFound:
    if versions:
        aliases = [alias for version in versions for alias in version.aliases]
        held = f"It has versions {versions[-1].number} to {versions[0].number}"
        held += f" and the aliases {', '.join(sorted(aliases))}." if aliases else " and no aliases."
        return AdapterNotFound(f"There is no adapter {reference}.", hint=held, adapter=str(reference))
    # Only this tenant's names: which others there are is nobody else's business.
    with db.read() as session:
        query = select(AdapterVersionRow.name).where(AdapterVersionRow.tenant == reference.tenant).distinct()
        names = list(session.scalars(query))
    near = difflib.get_close_matches(reference.name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(f'{reference.tenant}/{name}' for name in near)}?" if near else None
    return AdapterNotFound(
        f"There is no adapter {reference}.",
        hint=hint or "`adaptory adapters versions` shows all.",
        adapter=str(reference),
    )


def _moved(subject: str, expect: int, found: int | None) -> AliasMoved:
    stands = f"names version {found}" if found else "does not exist"
    thought = f"version {expect}" if expect else "that there was none"
    return AliasMoved(
        f"The alias {subject} {stands}, and {thought} was expected: somebody else changed it first.",
        hint=f"Look at `adaptory adapters history {subject}`, and repeat it with --expect {found or 0} if it is still wanted.",
        alias=subject,
        expected=expect,
        found=found,
    )
