"""The audit trail: written with the change or not at all, and never changed afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from orchestrator.db import Database, audit, open_database


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    db = open_database(f"sqlite:///{tmp_path / 'state.db'}")
    yield db
    db.close()


def note(db: Database, subject: str, before: object = None, after: object = None) -> None:
    with db.write() as session:
        audit.record(session, "ada@laptop", "alias.move", subject, before, after)


def test_what_was_recorded_is_read_newest_first(db: Database):
    note(db, "acme/intents@production", None, 1)
    note(db, "acme/intents@production", 1, {"version": 2})
    first, second = reversed(audit.entries(db))
    assert (first.actor, first.action, first.subject) == ("ada@laptop", "alias.move", "acme/intents@production")
    assert (first.before, first.after, second.before, second.after) == (None, 1, 1, {"version": 2})
    assert 0 < first.created_at <= second.created_at
    assert [entry.seq for entry in audit.entries(db, limit=1)] == [second.seq]


def test_by_subject_and_by_prefix_literally(db: Database):
    for subject in ("acme/a_b@x", "acme/aXb@x", "acme/a_b@y", "acme/a%@x"):
        note(db, subject)
    assert [entry.subject for entry in audit.entries(db, subject="acme/a_b@x")] == ["acme/a_b@x"]
    assert [entry.subject for entry in audit.entries(db, prefix="acme/a_b@")] == ["acme/a_b@y", "acme/a_b@x"]
    assert [entry.subject for entry in audit.entries(db, prefix="acme/a%")] == ["acme/a%@x"]


def test_a_change_that_fails_is_not_recorded(db: Database):
    def fail() -> None:
        with db.write() as session:
            audit.record(session, "ada", "key.revoke", "acme/key", {"id": 1}, None)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert audit.entries(db) == []


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'eve'", "DELETE FROM audit"])
def test_the_database_itself_refuses_to_change_it(db: Database, statement: str):
    note(db, "acme/intents@production", None, 1)

    def change() -> None:
        with db.write() as session:
            session.execute(text(statement))

    with pytest.raises(IntegrityError, match="only added to"):
        change()
    assert [entry.actor for entry in audit.entries(db)] == ["ada@laptop"]


def test_who_runs_this(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    assert audit.person().startswith("ada@")

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", unknown)
    assert audit.person().startswith("uid-")
