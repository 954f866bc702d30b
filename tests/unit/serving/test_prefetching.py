"""What routes lead to newly is fetched before anybody asks: after a change of a route, and after an alias has moved."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from orchestrator.db import Database
from orchestrator.limits.quota import Quota
from orchestrator.names import QualifiedName
from orchestrator.registry.versions import Reference, find_version, move_alias
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import delete_route, save_route
from orchestrator.routing.table import build_table
from orchestrator.routing.watcher import RouteWatcher
from orchestrator.tenants.tenant import add_tenant
from serving.app import Prefetching
from serving.known_adapters import KnownAdapters

TINY, LARGE, ABSENT = ("sha256:" + each * 32 for each in ("b1", "b2", "b3"))
ROUTE = QualifiedName("acme", "intents")

LOOP: Any = SimpleNamespace(call_soon_threadsafe=lambda function, *arguments: function(*arguments))


class Handle:
    """Of one base's engines: what they were asked to prefetch since the last look."""

    def __init__(self) -> None:
        self._asked: list[str] = []
        self.prefetch = SimpleNamespace(remote=lambda adapter: self._asked.append(adapter))

    def asked(self) -> list[str]:
        asked, self._asked[:] = sorted(self._asked), []
        return asked


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def test_each_base_is_told_of_its_own(db: Database, register_adapter: Callable[..., None]):
    add_tenant(db, "acme", Quota(), actor="ada")
    for number in (1, 2, 3):
        register_adapter(db, "acme/intents", digest(number), TINY)
    register_adapter(db, "acme/large", digest(4), LARGE)
    register_adapter(db, "acme/lost", digest(5), ABSENT)

    def promote(number: int) -> None:
        version = find_version(db, Reference(tenant="acme", name="intents", selector=str(number)))
        move_alias(db, version, "production", actor="ada")
        watcher.refresh()

    adapters, engines = KnownAdapters(db), {TINY: Handle(), LARGE: Handle()}
    bases = {"tiny": TINY, "large": LARGE}
    watcher = RouteWatcher(
        db,
        lambda: build_table(db, adapters, bases),
        replaced=Prefetching(engines, adapters.bases, awake=lambda base: True, loop=LOOP).follow,
    )
    promote(1)
    assert engines[TINY].asked() == []
    for name, reference in (("intents", "intents@production"), ("large", "large@1"), ("lost", "lost@1")):
        route = QualifiedName("acme", name)
        config = parse_config(route, {"adapters": [{"adapter": f"acme/{reference}"}], "fallback": ["previous"]})
        save_route(db, route, config, actor="ada", expected=0)
    watcher.refresh()
    assert (engines[TINY].asked(), engines[LARGE].asked()) == ([digest(1)], [digest(4)])
    promote(2)
    assert engines[TINY].asked() == [digest(2)], "the first stands in now, and is there already"
    promote(3)
    assert engines[TINY].asked() == [digest(3)]
    promote(1)
    assert engines[TINY].asked() == [digest(1)], "who comes back may be gone from memory"
    delete_route(db, ROUTE, actor="ada")
    watcher.refresh()
    assert (engines[TINY].asked(), engines[LARGE].asked()) == ([], [])
