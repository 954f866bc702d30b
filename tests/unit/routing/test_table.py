"""What a request's `model` field leads to, and that nothing of another tenant's shows. On both kinds of database."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import update

from orchestrator.db import Database
from orchestrator.db.models import RouteRevisionRow
from orchestrator.errors import DatabaseError, ModelNotFound, ModelUnavailable
from orchestrator.routing.repository import Route
from orchestrator.routing.table import Choice, RouteTable, build_table

BASES = {"tiny": "sha256:" + "b1" * 32, "Qwen/Qwen3-8B": "sha256:" + "b2" * 32}
PRODUCTION = [{"adapter": "acme/intents@production"}]


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


@pytest.fixture
def build(db: Database, registry: Any, tenants: None) -> Callable[..., RouteTable]:
    return lambda bases=BASES: build_table(db, registry, bases)


# --- what a name leads to -------------------------------------------------------------------------------------------


def test_a_route(set_route: Callable[..., Route], build: Callable[..., RouteTable]):
    set_route(adapters=PRODUCTION, fallback=["acme/intents@1", "base"], defaults={"system": "Be brief."})
    target = build().resolve("acme", "acme/intents", "ada")
    assert target.choices == (
        Choice("acme/intents@production", digest(1), "tiny", BASES["tiny"]),
        Choice("acme/intents@1", digest(2), "tiny", BASES["tiny"], fallback=True),
        Choice("base", None, "tiny", BASES["tiny"], fallback=True),
    )
    assert (target.model, target.adapter, target.base_model, target.revision) == ("acme/intents", digest(1), "tiny", 1)
    assert target.fallbacks == target.choices[1:]
    assert target.defaults.system == "Be brief."


def test_the_previous_version_stands_in(
    set_route: Callable[..., Route], registry: Any, build: Callable[..., RouteTable]
):
    """Of each arm its own; one that is there twice, that there is none of, or of another base, costs nobody else."""
    registry.has("acme/intents@production", 1, before=("acme/intents@2", 3))
    registry.has("acme/intents@staging", 6, before=("acme/intents@8", 8, "Qwen/Qwen3-8B"))
    arms = [{"adapter": f"acme/intents@{each}"} for each in ("production", "1", "staging")]
    set_route(adapters=arms, fallback=["previous", "acme/intents@2", "base"])
    table = build()
    chains = {
        choices[0].reference: [(each.reference, each.adapter, each.fallback) for each in choices[1:]]
        for choices in (table.resolve("acme", "acme/intents").choices for _ in range(200))
    }
    others = [("acme/intents@2", digest(3), True), ("base", None, True)]
    assert chains == {f"acme/intents@{each}": others for each in ("production", "1", "staging")}
    assert table.problems()["acme/intents"] == (
        "there is no version before acme/intents@1",
        "acme/intents@8 belongs to another base model than tiny",
    )
    assert table.adapters() == {digest(number) for number in (1, 2, 3, 6)}
    set_route(adapters=PRODUCTION, fallback=["previous"])
    second = build().resolve("acme", "acme/intents").choices[1]
    assert (second.reference, second.adapter, second.fallback) == ("acme/intents@2", digest(3), True)


def test_a_base_and_a_route_over_the_base_alone(set_route: Callable[..., Route], build: Callable[..., RouteTable]):
    set_route("acme/plain", base_model="tiny", defaults={"sampling": {"temperature": 0}})
    table = build()
    bare, routed = table.resolve("acme", "Qwen/Qwen3-8B"), table.resolve("acme", "acme/plain")
    assert bare.choices == (Choice("base", None, "Qwen/Qwen3-8B", BASES["Qwen/Qwen3-8B"]),)
    assert (bare.revision, bare.defaults.sampling.temperature) == (None, None)
    assert (routed.adapter, routed.base_model, routed.defaults.sampling.temperature) == (None, "tiny", 0)


def test_one_version(registry: Any, build: Callable[..., RouteTable]):
    """By alias, number and digest; looked up once, then remembered as long as the table lives."""
    by_digest = registry.has(f"acme/intents@{digest(3)}", 3)
    table = build()
    for model, expected in (
        ("acme/intents@production", digest(1)),
        ("acme/intents@2", digest(3)),
        (f"acme/intents@{by_digest}", digest(3)),
    ):
        target = table.resolve("acme", model)
        assert (target.model, target.adapter, target.fallbacks, target.revision) == (model, expected, (), None)
    asked = len(registry.asked)
    registry.has("acme/intents@production", 9)
    assert table.resolve("acme", "acme/intents@production").adapter == digest(1), "a table says the same all its life"
    assert len(registry.asked) == asked
    assert build().resolve("acme", "acme/intents@production").adapter == digest(9)


def test_a_version_published_after_the_table_is_found(registry: Any, build: Callable[..., RouteTable]):
    table = build()
    with pytest.raises(ModelNotFound):
        table.resolve("acme", "acme/intents@7")
    registry.has("acme/intents@7", 7)
    assert table.resolve("acme", "acme/intents@7").adapter == digest(7)


def test_the_table_asks_the_registry_once(
    set_route: Callable[..., Route], registry: Any, build: Callable[..., RouteTable]
):
    for number in range(5):
        set_route(f"acme/r{number}", adapters=PRODUCTION, fallback=["acme/intents@1"])
    build()
    assert registry.asked == [["acme/intents@1", "acme/intents@production"]]


def test_users_are_shared_out_and_stay(set_route: Callable[..., Route], build: Callable[..., RouteTable]):
    set_route(adapters=[{"adapter": "acme/intents@1", "weight": 75}, {"adapter": "acme/intents@2", "weight": 25}])
    first, second = build(), build()
    got = Counter()
    for number in range(2000):
        target = first.resolve("acme", "acme/intents", f"u{number}")
        assert second.resolve("acme", "acme/intents", f"u{number}") == target
        got[target.adapter] += 1
    assert got[digest(2)] / 2000 == pytest.approx(0.75, abs=0.05)
    assert {first.resolve("acme", "acme/intents").adapter for _ in range(200)} == {digest(2), digest(3)}


# --- nothing of another tenant's ------------------------------------------------------------------------------------


NEVER = (
    "nothing", "", "acme", "acme/", "/", "@", "acme/@1", "acme/intents@", "acme/nothing", "acme/nothing@1", "acme/intents@99",
    "acme/intents@staging", "ACME/intents", "acme/intents ", "acme/intents\n", "acme//intents", "../acme/intents",
    "acme/intents@" + digest(77), "\ud800", "é" * 5000, "tiny@1",
)  # fmt: skip


def test_unknown_names(set_route: Callable[..., Route], build: Callable[..., RouteTable]):
    set_route(adapters=PRODUCTION)
    table = build()
    for model in NEVER:
        with pytest.raises(ModelNotFound) as caught:
            table.resolve("acme", model)
        assert len(str(caught.value.to_dict())) < 600, model


def test_unknown_and_another_tenants_are_the_same_answer(
    set_route: Callable[..., Route], registry: Any, build: Callable[..., RouteTable]
):
    """Word for word, but for the name that was asked for; nor is the registry asked about somebody else's."""
    set_route(adapters=PRODUCTION)
    set_route("acme/broken", adapters=[{"adapter": "acme/gone@1"}])
    table = build()
    asked = len(registry.asked)
    said = {}
    for model in (
        "acme/intents",
        "acme/intents@1",
        "acme/broken",
        "acme/unknown",
        "acme/unknown@1",
        "nobody/x",
        "nobody/x@1",
    ):
        with pytest.raises(ModelNotFound) as caught:
            table.resolve("globex", model)
        said[model] = str(caught.value.to_dict()).replace(model, "NAME")
    assert len(set(said.values())) == 1, said
    assert len(registry.asked) == asked
    with pytest.raises(ModelNotFound) as caught:
        table.resolve("acme", "acme/unknown")
    assert str(caught.value.to_dict()).replace("acme/unknown", "NAME") in said.values(), "the same for one's own"
    with pytest.raises(ModelNotFound):
        table.resolve("acm", "acme/intents")


def test_lists_hold_the_tenants_own_and_the_bases(set_route: Callable[..., Route], build: Callable[..., RouteTable]):
    set_route(adapters=PRODUCTION)
    set_route("globex/intents", adapters=[{"adapter": "globex/intents@production"}])
    table = build()
    assert table.models("acme") == ("acme/intents", "Qwen/Qwen3-8B", "tiny")
    assert table.models("nobody") == ("Qwen/Qwen3-8B", "tiny")
    assert all(table.resolve("acme", name) for name in table.models("acme"))
    assert table.adapters() == {digest(1), digest(5)}


def test_a_base_of_a_routes_name_does_not_hide_the_route(
    set_route: Callable[..., Route], build: Callable[..., RouteTable]
):
    set_route(adapters=PRODUCTION)
    table = build({"tiny": BASES["tiny"], "acme/intents": "sha256:" + "b3" * 32})
    assert table.resolve("acme", "acme/intents").adapter == digest(1)
    assert table.resolve("globex", "acme/intents").choices[0].base_digest == "sha256:" + "b3" * 32
    assert table.models("acme").count("acme/intents") == 1


# --- what cannot be used --------------------------------------------------------------------------------------------


def test_a_missing_adapter_is_stood_in_for_only_as_the_route_says(
    set_route: Callable[..., Route], build: Callable[..., RouteTable]
):
    set_route("acme/strict", adapters=[{"adapter": "acme/gone@1"}], base_model="tiny")
    set_route(
        "acme/soft", adapters=[{"adapter": "acme/gone@1"}], base_model="tiny", fallback=["acme/intents@1", "base"]
    )
    table = build()
    with pytest.raises(ModelUnavailable, match="there is no acme/gone@1") as caught:
        table.resolve("acme", "acme/strict")
    assert caught.value.context["reasons"] == ["there is no acme/gone@1"]
    target = table.resolve("acme", "acme/soft")
    assert [(choice.adapter, choice.fallback) for choice in target.choices] == [(digest(2), True), (None, True)]
    assert table.problems() == dict.fromkeys(("acme/strict", "acme/soft"), ("there is no acme/gone@1",))


def test_half_a_route_fails_for_its_users_only(set_route: Callable[..., Route], build: Callable[..., RouteTable]):
    """Nobody is moved silently to the other arm."""
    set_route(adapters=[{"adapter": "acme/intents@1"}, {"adapter": "acme/gone@1"}])
    table, outcomes = build(), Counter()
    for number in range(400):
        try:
            outcomes[table.resolve("acme", "acme/intents", str(number)).adapter] += 1
        except ModelUnavailable:
            outcomes["unavailable"] += 1
    assert set(outcomes) == {digest(2), "unavailable"}
    assert outcomes["unavailable"] / 400 == pytest.approx(0.5, abs=0.13)


def test_an_adapter_of_another_base_is_not_put_on_this_one(
    set_route: Callable[..., Route], registry: Any, build: Callable[..., RouteTable]
):
    registry.has("acme/big@1", 20, base="Qwen/Qwen3-8B")
    registry.has("acme/alien@1", 21, base="sha256:" + "ff" * 32)
    set_route("acme/a", adapters=[{"adapter": "acme/big@1"}])
    set_route("acme/b", adapters=[{"adapter": "acme/big@1"}], base_model="tiny", fallback=["base"])
    set_route("acme/c", adapters=[{"adapter": "acme/alien@1"}], fallback=["base"])
    set_route("acme/d", adapters=[{"adapter": "acme/intents@1"}], base_model="gone", fallback=["base"])
    table = build()
    assert table.resolve("acme", "acme/a").base_model == "Qwen/Qwen3-8B"
    assert [choice.reference for choice in table.resolve("acme", "acme/b").choices] == ["base"]
    for model, says in (
        ("acme/c", "not served here"),
        ("acme/d", "'gone' is not served"),
        ("acme/alien@1", "not served"),
    ):
        with pytest.raises(ModelUnavailable, match=says):
            table.resolve("acme", model)


def test_one_unreadable_route_does_not_take_the_others_along(
    db: Database, set_route: Callable[..., Route], build: Callable[..., RouteTable]
):
    """Two that only a broken or newer writer can leave: another form, and another tenant's adapter."""
    for name in ("acme/good", "acme/new", "acme/stolen"):
        set_route(name, adapters=PRODUCTION)
    for name, config in (
        ("new", {"mirrors": []}),
        ("stolen", {"adapters": [{"adapter": "globex/intents@production"}], "fallback": ["base"]}),
    ):
        with db.write() as session:
            session.execute(update(RouteRevisionRow).where(RouteRevisionRow.name == name).values(config=config))
    table = build()
    assert table.resolve("acme", "acme/good").adapter == digest(1)
    for model in ("acme/new", "acme/stolen"):
        with pytest.raises(ModelUnavailable):
            table.resolve("acme", model)


def test_a_fallback_to_the_same_adapter_is_no_second_try(set_route: Callable[..., Route], registry: Any, build: Any):
    registry.has("acme/intents@previous", 1)
    set_route(adapters=PRODUCTION, fallback=["acme/intents@previous", "base"])
    assert [choice.reference for choice in build().resolve("acme", "acme/intents").choices] == [
        "acme/intents@production",
        "base",
    ]


def test_a_database_that_fails_is_no_answer(set_route: Callable[..., Route], registry: Any, build: Any):
    set_route(adapters=PRODUCTION)
    table = build()
    registry.broken = DatabaseError("It is away.")
    with pytest.raises(DatabaseError):
        build()
    with pytest.raises(DatabaseError):
        table.resolve("acme", "acme/intents@2")
    assert table.resolve("acme", "acme/intents").adapter == digest(1), "what the table holds needs no database"
    registry.broken = None
    assert table.resolve("acme", "acme/intents@2").adapter == digest(3), "and the failure is not remembered"


def test_nothing_of_it_can_be_changed(set_route: Callable[..., Route], build: Callable[..., RouteTable]):
    set_route(adapters=PRODUCTION, defaults={"json_schema": {"type": "object"}})
    table = build()
    target = table.resolve("acme", "acme/intents")
    assert isinstance(hash(target), int), "all of its parts are immutable values"
    for thing, name in ((table, "version"), (target, "choices"), (target.choices[0], "adapter")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)
    with pytest.raises(ValidationError):
        target.defaults.system = "x"
    with pytest.raises(TypeError):
        table.bases["x"] = "y"  # type: ignore[index]
