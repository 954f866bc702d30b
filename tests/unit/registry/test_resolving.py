"""References become digests: numbers, digests and aliases, of their own tenant and name only. On both kinds of database."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import event

from orchestrator.db import Database, open_database
from orchestrator.names import AdapterReference, QualifiedName
from orchestrator.registry.resolving import resolve_references
from orchestrator.registry.versions import Reference, find_version, move_alias
from orchestrator.routing.adapters import PreviousVersion, ResolvedAdapter
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import save_route
from orchestrator.routing.table import RouteTable, build_table
from orchestrator.routing.watcher import RouteWatcher

BASE, OTHER = "sha256:" + "b1" * 32, "sha256:" + "b2" * 32


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    db = open_database(database_url)
    yield db
    db.close()


@pytest.fixture
def publish(db: Database, register_adapter: Callable[..., None]) -> Callable[..., None]:
    """`publish("acme/intents", 7)`: the next version of that name, with digest 7."""
    return lambda name, number, base=BASE: register_adapter(db, name, digest(number), base)


def promote(db: Database, reference: str, alias: str = "production") -> None:
    name, _, number = reference.partition("@")
    tenant, _, short = name.partition("/")
    move_alias(db, find_version(db, Reference(tenant=tenant, name=short, selector=number)), alias, actor="ada")


def resolve(db: Database, *references: str) -> dict[str, ResolvedAdapter]:
    found = resolve_references(db, [AdapterReference.parse(each) for each in references])
    return {str(reference): adapter for reference, adapter in found.items()}


def test_all_kinds_of_references_in_one_query(db: Database, publish: Callable[..., None]):
    for number in (11, 12, 13):
        publish("acme/intents", number)
    publish("acme/other", 12, OTHER)  # equal weights: what the tenant's first said of them stays
    publish("globex/intents", 21, OTHER)
    promote(db, "acme/intents@2")
    promote(db, "globex/intents@1")
    sent: list[str] = []
    event.listen(db.engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    asked = ["acme/intents@1", "acme/intents@3", "acme/intents@production", f"acme/intents@{digest(13)}"]
    asked += [f"acme/other@{digest(12)}", "globex/intents@production", "globex/intents@1"]
    missing = ["acme/intents@4", "acme/intents@staging", f"acme/intents@{digest(21)}", f"acme/other@{digest(11)}"]
    found = resolve(db, *asked, *missing, "nobody/intents@1")
    assert len([text for text in sent if "adapter_versions" in text]) == 1
    first, second = (
        PreviousVersion("acme/intents@1", digest(11), BASE),
        PreviousVersion("acme/intents@2", digest(12), BASE),
    )
    assert found == {
        "acme/intents@1": ResolvedAdapter(digest(11), BASE),
        "acme/intents@3": ResolvedAdapter(digest(13), BASE, second),
        "acme/intents@production": ResolvedAdapter(digest(12), BASE),
        f"acme/intents@{digest(13)}": ResolvedAdapter(digest(13), BASE, second),
        f"acme/other@{digest(12)}": ResolvedAdapter(digest(12), BASE),
        "globex/intents@production": ResolvedAdapter(digest(21), OTHER),
        "globex/intents@1": ResolvedAdapter(digest(21), OTHER),
    }
    assert resolve(db, "acme/intents@2")["acme/intents@2"].previous == first
    assert resolve(db) == {}


def test_as_many_as_the_database_binds_values_for(db: Database, publish: Callable[..., None]):
    publish("acme/intents", 1)
    publish("acme/intents", 2)
    numbers = [f"acme/intents@{number}" for number in range(1, 12_001)]
    assert list(resolve(db, *numbers)) == ["acme/intents@1", "acme/intents@2"]


def test_what_an_alias_named_before(db: Database, publish: Callable[..., None]):
    for number in (1, 2, 3, 4):
        publish("acme/intents", number)

    def before() -> str | None:
        previous = resolve(db, "acme/intents@production")["acme/intents@production"].previous
        return previous.reference if previous else None

    for version, expected in ((1, None), (3, 1), (4, 3), (3, 1), (2, 3), (1, None), (4, 1)):
        promote(db, f"acme/intents@{version}")
        assert before() == (f"acme/intents@{expected}" if expected else None), f"after the move to {version}"
    promote(db, "acme/intents@4")
    assert before() == "acme/intents@1", "it stood there already"


def test_an_adapter_of_unknown_base_is_not_there(db: Database, publish: Callable[..., None]):
    publish("acme/intents", 1, None)
    publish("acme/intents", 2)
    assert resolve(db, "acme/intents@1", "acme/intents@2") == {"acme/intents@2": ResolvedAdapter(digest(2), BASE)}


MOVE = """
import sys
from orchestrator.db import open_database
from orchestrator.registry.versions import Reference, find_version, move_alias
db = open_database(sys.argv[1])
version = find_version(db, Reference(tenant="acme", name="intents", selector="2"))
input("ready\\n")
move_alias(db, version, "production", actor="other")
"""


def test_an_alias_that_another_process_moves_changes_the_route(
    db: Database, database_url: str, publish: Callable[..., None]
):
    """About two seconds. Counted from before the other process moves it; and what is to be prefetched is told."""
    publish("acme/intents", 1)
    publish("acme/intents", 2)
    promote(db, "acme/intents@1")
    name, told = QualifiedName("acme", "intents"), []
    config = parse_config(name, {"adapters": [{"adapter": "acme/intents@production"}], "fallback": ["previous"]})
    save_route(db, name, config, actor="ada", expected=0)

    def build() -> RouteTable:
        return build_table(db, lambda references: resolve_references(db, references), {"tiny": BASE})

    with RouteWatcher(db, build, replaced=lambda table: told.append(table.adapters())) as watcher:
        assert watcher.table.resolve("acme", "acme/intents@production").adapter == digest(1)
        command = [sys.executable, "-c", MOVE, database_url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin
            assert other.stdout
            assert other.stdout.readline() == "ready\n"
            other.stdin.write("\n")
            other.stdin.close()
            began = time.monotonic()
            while watcher.table.resolve("acme", "acme/intents").adapter != digest(2):
                assert time.monotonic() - began < 20
                time.sleep(0.01)
            assert other.wait(30) == 0
        first, then = watcher.table.resolve("acme", "acme/intents").choices
        assert (first.adapter, first.fallback) == (digest(2), False)
        assert (then.reference, then.adapter, then.fallback) == ("acme/intents@1", digest(1), True)
        assert watcher.table.resolve("acme", "acme/intents@production").adapter == digest(2)
        assert told == [{digest(1)}, {digest(1), digest(2)}]
