"""The database opens, migrates once for many processes, and says what is wrong when it cannot. About 3 s."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, select, text

from orchestrator.db import open_database
from orchestrator.db.database import HEAD, MIGRATIONS
from orchestrator.db.models import Base, TenantRow
from orchestrator.errors import DatabaseError
from orchestrator.registry.versions import list_versions


def url(path: Path) -> str:
    return f"sqlite:///{path / 'home' / 'state.db'}"


def test_migrations_from_nothing_give_the_models(tmp_path: Path):
    db = open_database(url(tmp_path))
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


def test_opening_again_keeps_what_is_there(tmp_path: Path):
    first = open_database(url(tmp_path))
    with first.write() as session:
        session.add(TenantRow(name="acme", created_at=1.5))
    first.close()
    second = open_database(url(tmp_path))
    with second.read() as session:
        assert session.scalars(select(TenantRow.created_at)).all() == [1.5]
    second.close()


def _open(database: str) -> int:
    db = open_database(database)
    with db.read() as session:
        found = len(session.scalars(select(TenantRow)).all())
    db.close()
    return found


def test_four_processes_create_one_database(tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_open, [url(tmp_path)] * 8) == [0] * 8


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


def test_a_password_is_never_shown():
    with pytest.raises(DatabaseError) as caught:
        open_database("postgresql://user:hunter2@127.0.0.1:1/none?connect_timeout=1")
    assert "hunter2" not in str(caught.value)
