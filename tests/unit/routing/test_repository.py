"""Routes change by revisions that stay; of two who change one at the same time, one is told. On both kinds of database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, select, update

from orchestrator.db import Database, counters
from orchestrator.db.models import RouteRevisionRow
from orchestrator.errors import AdaptoryError, RouteConflict, RouteInvalid, RouteNotFound, TenantNotFound
from orchestrator.names import QualifiedName
from orchestrator.routing import repository
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import (
    Route,
    delete_route,
    find_route,
    get_route,
    list_revisions,
    list_routes,
    rollback,
    save_route,
)

NAME = QualifiedName("acme", "intents")


def one(version: int | str) -> list[dict[str, Any]]:
    return [{"adapter": f"acme/intents@{version}"}]


def version(db: Database) -> int:
    with db.read() as session:
        return counters.current(session, counters.ROUTING)


def said(route: Route) -> str:
    return route.config["adapters"][0]["adapter"].partition("@")[2]


def test_each_change_is_a_revision_with_who_and_when(db: Database, set_route: Callable[..., Route]):
    first = set_route(adapters=one(1))
    second = set_route(adapters=one(2), fallback=["base"])
    assert (first.revision, second.revision, second.created_by) == (1, 2, "ada")
    assert list_revisions(db, NAME) == [second, first]
    assert get_route(db, NAME) == second
    assert list_routes(db) == list_routes(db, tenant="acme") == [second]
    assert list_routes(db, tenant="globex") == []
    assert first.created_at <= second.created_at


def test_saying_the_same_again_changes_nothing(db: Database, set_route: Callable[..., Route]):
    schema = {"type": "object", "properties": {"z": {"type": "number", "minimum": 1.0}, "a": {}}}
    values = {"adapters": one(1), "defaults": {"json_schema": schema, "sampling": {"temperature": 1}}}
    first, before = set_route(**values), version(db)
    assert set_route(**values) == first
    assert version(db) == before
    assert len(list_revisions(db, NAME)) == 1


def test_rolling_back_goes_back_step_by_step(db: Database, set_route: Callable[..., Route]):
    for number in (1, 2, 3):
        set_route(adapters=one(number))
    back = rollback(db, NAME, actor="bob")
    assert (back.revision, back.restores, said(back), back.created_by) == (4, 2, "2", "bob")
    again = rollback(db, NAME, actor="bob")
    assert (again.revision, again.restores, said(again)) == (5, 1, "1")
    with pytest.raises(RouteNotFound, match="no revision 0"):
        rollback(db, NAME, actor="bob")
    chosen = rollback(db, NAME, actor="bob", to=3)
    assert (chosen.revision, chosen.restores, said(chosen)) == (6, 3, "3")
    assert (rollback(db, NAME, actor="bob", to=4).restores) == 2, (
        "what a rollback brought back is named, not the rollback"
    )
    assert [said(each) for each in list_revisions(db, NAME)] == list("2312321")
    with pytest.raises(RouteNotFound):
        rollback(db, NAME, actor="bob", to=99)


def test_every_change_advances_the_counter(db: Database, set_route: Callable[..., Route]):
    numbers = [version(db)]
    for act in (
        lambda: set_route(adapters=one(1)),
        lambda: set_route(adapters=one(2)),
        lambda: rollback(db, NAME, actor="a"),
    ):
        act()
        numbers.append(version(db))
    assert numbers == [0, 1, 2, 3]


def test_who_comes_too_late_is_told(db: Database, set_route: Callable[..., Route]):
    set_route(adapters=one(1))
    set_route(adapters=one(2))
    for expected in (0, 1, 3):
        with pytest.raises(RouteConflict, match="ada has set revision 2"):
            save_route(db, NAME, parse_config(NAME, {"adapters": one(9)}), actor="bob", expected=expected)
    assert said(get_route(db, NAME)) == "2"


@pytest.mark.parametrize("there", [False, True])
def test_of_many_at_the_same_moment_one_wins(db: Database, set_route: Callable[..., Route], there: bool):
    expected = set_route(adapters=one(99)).revision if there else 0
    barrier, results = threading.Barrier(6), []

    def compete(number: int) -> None:
        config = parse_config(NAME, {"adapters": one(number)})
        barrier.wait()
        try:
            results.append(save_route(db, NAME, config, actor=f"a{number}", expected=expected))
        except AdaptoryError as error:
            results.append(error)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [result for result in results if isinstance(result, Route)]
    assert len(results) == 6, "one died of an error that is not ours"
    assert len(won) == 1
    assert all(isinstance(result, Route | RouteConflict) for result in results)
    assert get_route(db, NAME) == won[0]
    assert len(list_revisions(db, NAME)) == version(db) == expected + 1


def test_many_who_repeat_lose_no_change(db: Database, set_route: Callable[..., Route]):
    """Four people each raise a weight by one six times, reading again when told; no step is lost, no revision skipped."""
    set_route(adapters=one(1))
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(6):
                while True:
                    now = get_route(db, NAME)
                    (arm,) = now.config["adapters"]
                    values = {"adapters": [{**arm, "weight": arm["weight"] + 1}]}
                    try:
                        save_route(db, NAME, parse_config(NAME, values), actor="x", expected=now.revision)
                        break
                    except RouteConflict:
                        continue
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert get_route(db, NAME).config["adapters"][0]["weight"] == 25
    assert [each.revision for each in list_revisions(db, NAME)] == list(range(25, 0, -1))
    assert version(db) == 25


def test_unknown_routes_tenants_and_adapters(db: Database, set_route: Callable[..., Route], registry: Any):
    set_route(adapters=one(1))
    with pytest.raises(RouteNotFound, match="Did you mean acme/intents"):
        get_route(db, QualifiedName("acme", "intent"))
    with pytest.raises(RouteNotFound) as caught:
        get_route(db, QualifiedName("globex", "intents"))
    assert "acme" not in str(caught.value), "names of another tenant's are not suggested"
    with pytest.raises(RouteNotFound):
        list_revisions(db, QualifiedName("acme", "nothing"))
    for act in (
        lambda: set_route("nobody/x", adapters=[{"adapter": "nobody/x@1"}]),
        lambda: list_routes(db, tenant="nobody"),
    ):
        with pytest.raises(TenantNotFound):
            act()
    config = parse_config(NAME, {"adapters": one(2), "fallback": ["acme/intents@77"]})
    with pytest.raises(RouteInvalid, match="acme/intents@77"):
        save_route(db, NAME, config, actor="ada", expected=1, resolver=registry)
    assert save_route(db, NAME, parse_config(NAME, {"adapters": one(2)}), actor="a", expected=1, resolver=registry)


def test_adapters_of_two_bases_share_no_route(db: Database, set_route: Callable[..., Route], registry: Any):
    registry.has("acme/intents@8", 8, base="Qwen/Qwen3-8B")
    for values in ({"adapters": one(1) + one(8)}, {"adapters": one(1), "fallback": ["base", "acme/intents@8"]}):
        with pytest.raises(RouteInvalid, match="acme/intents@8: it was trained on the base model") as caught:
            save_route(db, NAME, parse_config(NAME, values), actor="ada", expected=0, resolver=registry)
        assert caught.value.context["value"] == "acme/intents@8"
    assert list_routes(db) == []
    both = parse_config(NAME, {"adapters": one(8), "fallback": ["base"]})
    assert save_route(db, NAME, both, actor="ada", expected=0, resolver=registry).revision == 1


def test_a_deleted_route_is_gone_until_it_is_brought_back(db: Database, set_route: Callable[..., Route]):
    set_route(adapters=one(1))
    set_route(adapters=one(2))
    with pytest.raises(RouteConflict, match="ada has set revision 2"):
        delete_route(db, NAME, actor="bob", expected=1)
    assert said(delete_route(db, NAME, actor="bob", expected=2)) == "2"
    assert version(db) == 3
    assert (find_route(db, NAME), list_routes(db)) == (None, [])
    for act in (
        lambda: get_route(db, NAME),
        lambda: list_revisions(db, NAME),
        lambda: delete_route(db, NAME, actor="b"),
    ):
        with pytest.raises(RouteNotFound) as caught:
            act()
        assert "adaptory routes rollback acme/intents" in str(caught.value)
    with pytest.raises(RouteConflict, match="it is gone"):
        save_route(db, NAME, parse_config(NAME, {"adapters": one(3)}), actor="eve", expected=2)
    back = rollback(db, NAME, actor="bob")
    assert (back.revision, back.restores, said(back), version(db)) == (3, 2, "2", 4)
    delete_route(db, NAME, actor="bob")
    assert set_route(adapters=one(4)).revision == 4
    assert [said(each) for each in list_revisions(db, NAME)] == list("4221")
    assert rollback(db, NAME, actor="bob", to=1).revision == 5


def test_revisions_are_written_once(db: Database, set_route: Callable[..., Route]):
    """No function of ours edits one: every statement on the table is an insert or a select."""
    statements: list[str] = []

    @event.listens_for(db.engine, "before_cursor_execute")
    def seen(connection, cursor, statement, *rest) -> None:
        statements.append(statement)

    set_route(adapters=one(1))
    set_route(adapters=one(2))
    rollback(db, NAME, actor="bob")
    touching = [statement for statement in statements if "route_revisions" in statement]
    assert touching
    assert {statement.split()[0] for statement in touching} == {"INSERT", "SELECT"}


def test_every_change_is_reported_once(db: Database, set_route: Callable[..., Route], monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple] = []
    monkeypatch.setattr(repository, "changed", lambda session, *what, **states: seen.append((*what, states)))
    set_route(adapters=one(1))
    set_route(adapters=one(1))
    set_route(adapters=one(2))
    rollback(db, NAME, actor="bob")
    assert [entry[:3] for entry in seen] == [
        ("ada", "route.set", "acme/intents"),
        ("ada", "route.set", "acme/intents"),
        ("bob", "route.rollback", "acme/intents"),
    ]
    assert [entry[3]["before"] and entry[3]["before"]["revision"] for entry in seen] == [None, 1, 2]
    assert [entry[3]["after"]["revision"] for entry in seen] == [1, 2, 3]


def test_what_a_later_version_wrote_can_still_be_shown(db: Database, set_route: Callable[..., Route]):
    set_route(adapters=one(1))
    with db.write() as session:
        session.execute(update(RouteRevisionRow).values(config={"mirrors": [1]}))
    assert list_routes(db)[0].config == {"mirrors": [1]}
    with db.read() as session:
        assert len(session.scalars(select(RouteRevisionRow)).all()) == 1
