"""The database opens, migrates once for many processes, and says what is wrong when it cannot. About 10 s."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from orchestrator.db import Database, audit, counters, open_database
from orchestrator.db.database import HEAD, MIGRATIONS
from orchestrator.db.models import AdapterAliasRow, Base, TenantRow
from orchestrator.errors import DatabaseError
from orchestrator.registry.versions import list_versions


def url(path: Path) -> str:
    return f"sqlite:///{path / 'home' / 'state.db'}"


def test_migrations_from_nothing_give_the_models(database_url: str):
    db = open_database(database_url)
    with db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "render_as_batch": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == HEAD
    db.close()


def test_head_is_the_newest_migration():
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_adapters_of_an_older_version_become_first_versions(tmp_path: Path):
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    open_database(url(tmp_path)).close()
    engine = create_engine(url(tmp_path))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        assert not inspect(connection).has_table("audit")
        connection.execute(text("INSERT INTO tenants VALUES ('acme', 1.0)"))
        for name, digest in (("intents", "sha256:aa"), ("entities", "sha256:bb")):
            connection.execute(
                text("INSERT INTO adapters VALUES ('acme', :digest, :name, :run, NULL, 8, 5.5, '{}', '{}')"),
                {"digest": digest, "name": name, "run": f"{name}-abc234"},
            )
    engine.dispose()
    db = open_database(url(tmp_path))
    found = {(v.reference, v.digest, v.run_id, v.created_at, v.created_by) for v in list_versions(db)}
    assert found == {
        ("acme/intents@1", "sha256:aa", "intents-abc234", 5.5, "run intents-abc234"),
        ("acme/entities@1", "sha256:bb", "entities-abc234", 5.5, "run entities-abc234"),
    }
    db.close()


def test_what_aliases_named_before_is_told_by_the_audit_trail(database_url: str):
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    db = open_database(database_url)
    with db._writer.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0003")
        connection.execute(text("INSERT INTO tenants (name, created_at) VALUES ('acme', 1.0)"))
        moves = {"production": (1, 3, 4, 3), "staging": (2,)}
        for number in (1, 2, 3, 4):
            values = {"number": number, "digest": f"sha256:{number}"}
            connection.execute(
                text("INSERT INTO adapter_versions VALUES ('acme', 'intents', :number, :digest, NULL, 1.0, 'ada')"),
                values,
            )
        for alias, numbers in moves.items():
            for before, after in zip((None, *numbers), numbers, strict=False):
                audit.record(Session(connection), "ada", "alias.move", f"acme/intents@{alias}", before, after)
            values = {"alias": alias, "number": numbers[-1]}
            connection.execute(
                text("INSERT INTO adapter_aliases VALUES ('acme', 'intents', :alias, :number, 1.0)"), values
            )
    db.close()
    db = open_database(database_url)
    with db.read() as session:
        rows = session.execute(select(AdapterAliasRow.alias, AdapterAliasRow.previous))
        assert dict(rows.tuples().all()) == {"production": 1, "staging": None}
    db.close()


def test_migrations_go_back_to_nothing(database_url: str):
    db = open_database(database_url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with db._writer.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with db.engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    db.close()
    open_database(database_url).close()


def test_a_reader_sees_one_moment(db: Database):
    """A second query in the same session must not see what was committed meanwhile."""
    with db.read() as session:
        assert counters.current(session, "x") == 0
        with db.write() as other:
            assert counters.advance(other, "x") == 1
        assert counters.current(session, "x") == 0
    with db.read() as session:
        assert counters.current(session, "x") == 1


def test_no_count_is_lost(db: Database):
    seen: list[int] = []

    def count() -> None:
        for _ in range(20):
            with db.write() as session:
                seen.append(counters.advance(session, "x"))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(1, 81))


def test_opening_again_keeps_what_is_there(database_url: str):
    first = open_database(database_url)
    with first.write() as session:
        session.add(TenantRow(name="acme", created_at=1.5))
    first.close()
    second = open_database(database_url)
    with second.read() as session:
        assert session.scalars(select(TenantRow.created_at)).all() == [1.5]
    second.close()


def _open(database: str) -> int:
    db = open_database(database)
    with db.read() as session:
        found = len(session.scalars(select(TenantRow)).all())
    db.close()
    return found


def test_four_processes_create_one_database(database_url: str):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_open, [database_url] * 8) == [0] * 8


def test_a_killed_migration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.create_index", killed)
        with pytest.raises(KeyboardInterrupt):
            open_database(url(tmp_path))
    with sqlite3.connect(tmp_path / "home" / "state.db") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    connection.close()
    open_database(url(tmp_path)).close()


def test_a_newer_schema_is_refused(tmp_path: Path):
    db = open_database(url(tmp_path))
    with db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num='9999'")
    db.close()
    with pytest.raises(DatabaseError, match="schema 9999") as caught:
        open_database(url(tmp_path))
    assert "upgrade" in (caught.value.hint or "")


def test_a_failing_block_saves_nothing(tmp_path: Path):
    db = open_database(url(tmp_path))

    def fail_after_adding() -> None:
        with db.write() as session:
            session.add(TenantRow(name="acme", created_at=1.0))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_adding()
    with db.read() as session:
        assert session.scalars(select(TenantRow)).all() == []
    db.close()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("sqlite://", "no file"),
        ("nonsense", "ADAPTORY_DATABASE_URL"),
        ("oracle9://host/x", "ADAPTORY_DATABASE_URL"),
        ("sqlite:////proc/nowhere/state.db", "cannot be made"),
    ],
)
def test_urls_that_cannot_be_used(bad: str, says: str):
    with pytest.raises(DatabaseError, match=says) as caught:
        open_database(bad)
    assert caught.value.hint


def test_a_file_that_is_no_database_is_named(tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "state.db").write_bytes(b"not a database, " * 100)
    with pytest.raises(DatabaseError, match="not a database"):
        open_database(url(tmp_path))


@pytest.mark.parametrize(
    ("said", "free", "hint"),
    [
        ("disk I/O error", 0, "is full: free some space"),
        ("database or disk is full", 1 << 40, "is full: free some space"),
        ("disk I/O error", 1 << 40, "fails: look at its state"),
    ],
)
def test_a_disk_that_is_full_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, free: int, hint: str):
    db = open_database(url(tmp_path))
    monkeypatch.setattr(
        "shutil.disk_usage", lambda place: SimpleNamespace(free=free if place == tmp_path / "home" else 7)
    )
    with pytest.raises(DatabaseError, match=said) as caught, db.read():
        raise OperationalError("SELECT 1", {}, sqlite3.OperationalError(said))
    assert hint in str(caught.value.hint)
    assert "ADAPTORY_DATABASE_URL" not in str(caught.value.hint)
    db.close()


def test_a_password_is_never_shown():
    with pytest.raises(DatabaseError) as caught:
        open_database("postgresql://user:hunter2@127.0.0.1:1/none?connect_timeout=1")
    assert "hunter2" not in str(caught.value)
