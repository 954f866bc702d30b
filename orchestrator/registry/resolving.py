"""What references mean now, for the route table: one query, however many they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Select, String, and_, cast, func, select, tuple_, union_all
from sqlalchemy.orm import Session, aliased

from orchestrator.db import Database
from orchestrator.db.models import AdapterAliasRow, AdapterRow, AdapterVersionRow
from orchestrator.names import AdapterReference
from orchestrator.routing.adapters import PreviousVersion, ResolvedAdapter

MOST = 5000
"""References in one query: SQLite binds 32,766 values, three for each."""


def resolve_references(
    db: Database, references: Collection[AdapterReference]
) -> dict[AdapterReference, ResolvedAdapter]:
    """`routing.adapters.Resolver` over the registry's tables. A reference means versions of its own tenant and name only.

    Raises:
        DatabaseError
    """
    wanted = list(references)
    found: dict[AdapterReference, ResolvedAdapter] = {}
    with db.read() as session:
        for start in range(0, len(wanted), MOST):
            found |= _resolved(session, wanted[start : start + MOST])
    return found


def _resolved(session: Session, references: list[AdapterReference]) -> dict[AdapterReference, ResolvedAdapter]:
    by_key = {(each.tenant, each.name, each.version): each for each in references}
    named = union_all(*_named(references)).cte("named")
    version, before = aliased(AdapterVersionRow), aliased(AdapterVersionRow)
    adapter, adapter_before = aliased(AdapterRow), aliased(AdapterRow)

    def numbered(row: Any, number: Any) -> Any:
        return and_(row.tenant == named.c.tenant, row.name == named.c.name, row.number == number)

    def published(row: Any, version: Any) -> Any:
        return and_(row.tenant == version.tenant, row.digest == version.digest)

    query = (
        select(
            *(named.c.tenant, named.c.name, named.c.version),
            *(version.digest, adapter.base_digest),
            *(before.number, before.digest, adapter_before.base_digest),
        )
        .join(version, numbered(version, named.c.number))
        .join(adapter, published(adapter, version))
        .outerjoin(before, numbered(before, named.c.previous))
        .outerjoin(adapter_before, published(adapter_before, before))
    )
    found = {}
    for tenant, name, text, digest, base, number, digest_before, base_before in session.execute(query):
        previous = PreviousVersion(f"{tenant}/{name}@{number}", digest_before, base_before) if base_before else None
        if base is not None:
            found[by_key[tenant, name, text]] = ResolvedAdapter(digest, base, previous)
    return found


def _named(references: list[AdapterReference]) -> list[Select[Any]]:
    """Which version each reference names, and which one was before it; as rows of (tenant, name, version as it was written,
    number, previous number)."""
    row, older, alias = AdapterVersionRow, aliased(AdapterVersionRow), AdapterAliasRow
    last = select(func.max(older.number)).where(
        older.tenant == row.tenant, older.name == row.name, older.number < row.number
    )
    kinds: tuple[tuple[Any, Any, Any, Any, list[tuple[str, str, Any]]], ...] = (
        (
            *(row, row.number, cast(row.number, String), last.scalar_subquery()),
            [(r.tenant, r.name, r.number) for r in references if r.number],
        ),
        (
            *(row, row.digest, row.digest, last.scalar_subquery()),
            [(r.tenant, r.name, r.digest) for r in references if r.digest],
        ),
        (
            *(alias, alias.alias, alias.alias, alias.previous),
            [(r.tenant, r.name, r.alias) for r in references if r.alias],
        ),
    )
    return [
        select(
            table.tenant.label("tenant"),
            table.name.label("name"),
            written.label("version"),
            table.number.label("number"),
            previous.label("previous"),
        ).where(tuple_(table.tenant, table.name, selector).in_(wanted))
        for table, selector, written, previous, wanted in kinds
        if wanted
    ]
