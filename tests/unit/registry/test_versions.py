"""Versions and aliases in the database; who races whom does so in processes of their own (8 s)."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db import Database, audit, open_database
from orchestrator.errors import AdapterError, AdapterNotFound, AliasMoved
from orchestrator.registry.versions import (
    AdapterVersion,
    Reference,
    find_version,
    history,
    list_versions,
    move_alias,
    parse_reference,
    register,
)


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def add(db: Database, number: int, name: str = "intents", tenant: str = "acme", **options: Any) -> AdapterVersion:
    with db.write() as session:
        return register(session, tenant, name, digest(number), actor="ada", **options)


def find(db: Database, text: str) -> AdapterVersion:
    return find_version(db, parse_reference(text, "default"))


# --- versions -------------------------------------------------------------------------------------------------------


def test_numbers_count_up_within_a_name_and_equal_digests_are_one_version(db: Database) -> None:
    assert [add(db, n).number for n in (10, 11, 10, 12, 11)] == [1, 2, 1, 3, 2]
    assert add(db, 10, name="entities").number == 1
    assert add(db, 10, tenant="umbrella", run_id="intents-abc234").run_id == "intents-abc234"
    assert [v.reference for v in list_versions(db)] == [
        *("acme/entities@1", "acme/intents@3", "acme/intents@2", "acme/intents@1", "umbrella/intents@1")
    ]
    assert [v.reference for v in list_versions(db, digest=digest(10))] == [
        *("acme/entities@1", "acme/intents@1", "umbrella/intents@1")
    ]
    registered = audit.entries(db, prefix="acme/intents@")
    assert [(e.action, e.subject, e.after) for e in registered] == [
        ("adapter.register", f"acme/intents@{n}", {"digest": digest(9 + n)}) for n in (3, 2, 1)
    ]


def test_every_way_to_name_a_version(db: Database) -> None:
    for number in (10, 11, 12):
        add(db, number)
    move_alias(db, find(db, "acme/intents@2"), "production", actor="ada")
    for text, number in (
        ("acme/intents@1", 1),
        ("acme/intents@production", 2),
        (f"acme/intents@{digest(12)}", 3),
        ("acme/intents", 3),
    ):
        assert find(db, text).number == number
    assert find(db, "acme/intents@production").aliases == ("production",)
    add(db, 13, tenant="default")
    assert find(db, "intents@1").digest == digest(13)
    with pytest.raises(AdapterError, match="fits acme/intents@3, acme/intents@2, acme/intents@1"):
        find(db, "acme/intents@sha256:000000")


def test_what_names_nothing_says_what_there_is(db: Database) -> None:
    add(db, 10)
    add(db, 11, tenant="umbrella", name="secret")
    move_alias(db, find(db, "acme/intents@1"), "production", actor="ada")
    for text in ("acme/intents@2", "acme/intents@staging", f"acme/intents@{digest(11)}"):
        with pytest.raises(AdapterNotFound, match="It has versions 1 to 1 and the aliases production"):
            find(db, text)
    with pytest.raises(AdapterNotFound, match="Did you mean acme/intents"):
        find(db, "acme/intent@1")
    with pytest.raises(AdapterNotFound) as caught:
        find(db, "acme/secre@1")
    assert "secret" not in str(caught.value), "another tenant's names are not told"


@pytest.mark.parametrize(
    "text",
    [
        *("../etc@1", "acme/../x@1", "acme/a/b@1", "/intents@1", "acme/@1", "acme/intents@", "acme/intents@0", "@3"),
        *("Acme/intents@1", "acme/in_tents@1", "acme/intents@Production", "acme/intents@1.5", "acme/intents@-x"),
        *("acme/intents@sha256:12", "acme/intents@sha256:xyz", "acme/intents@a/b", "acme/intents@1@2", ""),
        *("acme/intents@" + "9" * 30, "a" * 64 + "/x@1", "acme/intents@\u0663", "acme/intents\n@1"),
    ],
)
def test_no_names(text: str) -> None:
    with pytest.raises(AdapterError, match="is no name of an adapter") as caught:
        parse_reference(text, "default")
    assert caught.value.context["check"] == "name"


def test_a_reference_prints_as_it_is_written() -> None:
    for text in ("acme/intents@production", "acme/intents@3", "acme/intents@sha256:abcdef", "acme/intents"):
        assert str(parse_reference(text, "default")) == text
    assert parse_reference("x@3", "acme") == Reference(tenant="acme", name="x", selector="3")


# --- aliases --------------------------------------------------------------------------------------------------------


def test_an_alias_moves_and_keeps_its_history(db: Database) -> None:
    one, two = add(db, 10), add(db, 11)
    moves = [
        move_alias(db, version, "production", actor=actor)
        for version, actor in ((one, "ada"), (two, "grace"), (two, "ada"), (one, "alan"))
    ]
    assert [(m.before, m.after, m.moved) for m in moves] == [
        *((None, 1, True), (1, 2, True), (2, 2, False), (2, 1, True))
    ]
    reference = parse_reference("acme/intents@production", "default")
    assert [(e.actor, e.before, e.after) for e in history(db, reference)] == [
        *(("alan", 2, 1), ("grace", 1, 2), ("ada", None, 1))
    ]
    whole = history(db, parse_reference("acme/intents", "default"))
    assert [e.subject for e in whole][-2:] == ["acme/intents@2", "acme/intents@1"]
    assert len(whole) == 5
    assert [v.aliases for v in list_versions(db)] == [(), ("production",)]


def test_expected_it_moves_only_from_there(db: Database) -> None:
    one, two = add(db, 10), add(db, 11)
    with pytest.raises(AliasMoved, match="does not exist, and version 1 was expected"):
        move_alias(db, one, "production", actor="ada", expect=1)
    assert move_alias(db, one, "production", actor="ada", expect=0).before is None
    with pytest.raises(AliasMoved, match="names version 1, and that there was none was expected") as caught:
        move_alias(db, two, "production", actor="ada", expect=0)
    assert (caught.value.context["expected"], caught.value.context["found"]) == (0, 1)
    with pytest.raises(AliasMoved):
        move_alias(db, two, "production", actor="ada", expect=2)
    assert move_alias(db, two, "production", actor="ada", expect=1).after == 2
    assert len(history(db, parse_reference("acme/intents@production", "default"))) == 2


@pytest.mark.parametrize("alias", ["3", "", "Production", "a/b", "sha256:abcdef", "-a", "a-", "a" * 64, "a\n"])
def test_no_aliases(db: Database, alias: str) -> None:
    version = add(db, 10)
    with pytest.raises(AdapterError, match="cannot be an alias"):
        move_alias(db, version, alias, actor="ada")


def test_an_alias_of_nothing_cannot_be_made(db: Database) -> None:
    version = add(db, 10)
    with pytest.raises(AdapterNotFound, match="acme/intents@7"):
        move_alias(db, version.model_copy(update={"number": 7}), "production", actor="ada")
    assert [v.aliases for v in list_versions(db)] == [()]


# --- races ----------------------------------------------------------------------------------------------------------

RACERS = 4


def _move(path: str, start: Any, number: int, expect: Any) -> str:
    """One process: waits for the others, then moves the alias to its own version."""
    db = open_database(path)
    try:
        version = find_version(db, parse_reference(f"acme/intents@{number}", "default"))
        start.wait()
        move = move_alias(db, version, "production", actor=f"p{number}", expect=expect)
        return f"{move.before}->{move.after}"
    except AliasMoved as error:
        return f"refused at {error.context['found']}"
    finally:
        db.close()


def _register(path: str, start: Any, number: int, _: Any) -> str:
    db = open_database(path)
    try:
        start.wait()
        return str([add(db, 100 * number + n).number for n in range(5)])
    finally:
        db.close()


def race(home: Path, work: Any, expect: Any = None) -> list[str]:
    context = multiprocessing.get_context("spawn")
    path = f"sqlite:///{home / 'state.db'}"
    with context.Manager() as manager, context.Pool(RACERS) as pool:
        start = manager.Barrier(RACERS)
        return pool.starmap(work, [(path, start, number, expect) for number in range(1, RACERS + 1)], chunksize=1)


@pytest.fixture
def versions(db: Database) -> None:
    for number in range(RACERS):
        add(db, number)


@pytest.mark.usefixtures("versions")
def test_of_processes_that_expect_the_same_exactly_one_moves_it(db: Database, home: Path) -> None:
    found = race(home, _move, expect=0)
    won = [answer for answer in found if answer.startswith("None->")]
    assert len(won) == 1
    winner = int(won[0].removeprefix("None->"))
    assert sorted(found) == sorted([won[0], *[f"refused at {winner}"] * (RACERS - 1)])
    (entry,) = history(db, parse_reference("acme/intents@production", "default"))
    assert (entry.actor, entry.before, entry.after) == (f"p{winner}", None, winner)
    assert find(db, "acme/intents@production").number == winner


@pytest.mark.usefixtures("versions")
def test_processes_that_expect_nothing_leave_an_unbroken_history(db: Database, home: Path) -> None:
    race(home, _move, expect="any")
    entries = list(reversed(history(db, parse_reference("acme/intents@production", "default"))))
    assert sorted(entry.after for entry in entries) == list(range(1, RACERS + 1))
    assert [entry.before for entry in entries] == [None, *(entry.after for entry in entries[:-1])]
    assert find(db, "acme/intents@production").number == entries[-1].after


def test_processes_that_register_at_once_take_different_numbers(db: Database, home: Path) -> None:
    race(home, _register)
    assert sorted(v.number for v in list_versions(db)) == list(range(1, 5 * RACERS + 1))
