"""A registry in memory, and routes over it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.db import Database
from orchestrator.limits.quota import Quota
from orchestrator.names import AdapterReference, QualifiedName
from orchestrator.routing.adapters import PreviousVersion, ResolvedAdapter
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import Route, find_route, save_route
from orchestrator.tenants.tenant import add_tenant

BASES = {"tiny": "sha256:" + "b1" * 32, "Qwen/Qwen3-8B": "sha256:" + "b2" * 32}


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


@dataclass
class MemoryRegistry:
    """The registry's resolver: what it knows, and every question that it was asked."""

    known: dict[str, ResolvedAdapter] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    broken: Exception | None = None

    def has(self, reference: str, number: int, base: str = "tiny", before: tuple[Any, ...] | None = None) -> str:
        """
        Args:
            before: of the previous version: its name, number and base.
        """
        previous = None
        if before is not None:
            name, older, *named = before
            previous = PreviousVersion(name, digest(older), BASES[named[0] if named else "tiny"])
        self.known[reference] = ResolvedAdapter(digest(number), BASES.get(base, base), previous)
        return digest(number)

    def __call__(self, references: Collection[AdapterReference]) -> dict[AdapterReference, ResolvedAdapter]:
        self.asked.append(sorted(map(str, references)))
        if self.broken:
            raise self.broken
        return {each: self.known[str(each)] for each in references if str(each) in self.known}


@pytest.fixture
def registry() -> MemoryRegistry:
    made = MemoryRegistry()
    for number, reference in enumerate(
        ("acme/intents@production", "acme/intents@1", "acme/intents@2", "acme/other@1", "globex/intents@production"), 1
    ):
        made.has(reference, number)
    return made


@pytest.fixture
def tenants(db: Database) -> None:
    for name in ("acme", "globex"):
        add_tenant(db, name, Quota(), actor="test")


@pytest.fixture
def set_route(db: Database, tenants: None) -> Callable[..., Route]:
    """Replace what a route says, from whatever it says now."""

    def save(name: str = "acme/intents", **values: Any) -> Route:
        route = QualifiedName.parse(name)
        now = find_route(db, route)
        config = parse_config(route, values)
        return save_route(db, route, config, actor="ada", expected=now.revision if now else 0)

    return save
