"""What references to adapters mean now, for the route table; each adapter's base is remembered, for prefetching."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.db import Database
from orchestrator.names import AdapterReference
from orchestrator.registry.resolving import resolve_references
from orchestrator.routing.adapters import ResolvedAdapter


class KnownAdapters:
    """A `orchestrator.routing.adapters.Resolver` over the registry."""

    def __init__(self, db: Database):
        self._db = db
        self.bases: dict[str, str] = {}
        """Digest of an adapter → digest of its base model."""

    def __call__(self, references: Collection[AdapterReference]) -> Mapping[AdapterReference, ResolvedAdapter]:
        found = resolve_references(self._db, references)
        for adapter in found.values():
            for each in (adapter, adapter.previous):
                if each is not None:
                    self.bases[each.digest] = each.base_digest
        return found
