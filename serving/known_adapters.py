"""What references to adapters mean now, for the route table: the registry's rows, asked once for all that the routes name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import and_, or_, select

from orchestrator.db import Database
from orchestrator.db.models import AdapterRow
from orchestrator.names import AdapterReference
from orchestrator.routing.adapters import ResolvedAdapter


class KnownAdapters:
    """A `orchestrator.routing.table.Resolver` that also remembers each adapter's base, for prefetching."""

    def __init__(self, db: Database):
        self._db = db
        self.bases: dict[str, str] = {}
        """Digest of an adapter → digest of its base model."""

    def __call__(self, references: Collection[AdapterReference]) -> Mapping[AdapterReference, ResolvedAdapter]:
        wanted = [reference for reference in references if reference.digest]
        if not wanted:
            return {}
        mine = [
            and_(AdapterRow.tenant == r.tenant, AdapterRow.name == r.name, AdapterRow.digest == r.digest)
            for r in wanted
        ]
        with self._db.read() as session:
            rows = session.scalars(select(AdapterRow).where(or_(*mine))).all()
            found = {(row.tenant, row.name, row.digest): row.base_digest for row in rows if row.base_digest}
        self.bases |= {digest: base for (_, _, digest), base in found.items()}
        by_reference = {r: (r.digest, found.get((r.tenant, r.name, r.digest or ""))) for r in wanted}
        return {r: ResolvedAdapter(digest, base) for r, (digest, base) in by_reference.items() if digest and base}
