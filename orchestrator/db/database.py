"""Open the database, bring its schema up to date, hand out sessions."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.orm import Session

from orchestrator.errors import DatabaseError

HEAD = "0004"
"""Newest migration. Known without importing Alembic, which costs each command a tenth of a second; a test compares."""

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 15.0
_LITTLE_BYTES = 1 << 20
_MIGRATION_LOCK = 0x61646170  # any constant of our own, for PostgreSQL's advisory lock


class Database:
    """Sessions over one engine. Every transaction is short: nothing waits for a network inside one."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._writer = engine.execution_options(adaptory_write=True)
        # SQLite's readers have one snapshot by nature; PostgreSQL's only when asked.
        many = engine.dialect.name == "postgresql"
        self._reader = engine.execution_options(isolation_level="REPEATABLE READ") if many else engine

    @property
    def where(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session on one snapshot; what is changed in it is not saved."""
        with self._explained(), Session(self._reader) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits when the block succeeds. On SQLite it holds the only write lock from its start on, so
        that what it reads cannot change before it writes."""
        with self._explained(), Session(self._writer) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise  # a name that is taken: the caller's to explain
        except DBAPIError as error:
            raise _typed(error, self.where) from error


def open_database(url: str) -> Database:
    """The database at `url` (SQLAlchemy's form), created or migrated if need be; safe in several processes at once.

    Raises:
        DatabaseError: it cannot be opened, or a newer version of Adaptory has changed it.
    """
    engine = _engine(url)
    db = Database(engine)
    try:
        with db._explained():
            _migrate(db)
    except BaseException:
        engine.dispose()
        raise
    return db


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() != "sqlite":
            return create_engine(parsed, pool_pre_ping=True)
        if not parsed.database or parsed.database == ":memory:":
            raise DatabaseError(f"{url} has no file.", hint="Write sqlite:///PATH.", url=url)
        Path(parsed.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    except ModuleNotFoundError as error:
        raise DatabaseError(
            f"The database driver {error.name} is not installed.", hint="pip install 'psycopg[binary]'."
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise DatabaseError(
            f"ADAPTORY_DATABASE_URL cannot be used: {error}.",
            hint="Write sqlite:///PATH or postgresql://USER@HOST/NAME.",
        ) from error
    except OSError as error:
        raise DatabaseError(
            f"The directory of {url} cannot be made: {error.strerror}.",
            hint="Point ADAPTORY_HOME to one you can write to.",
        ) from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # The driver's own habit of beginning late, and never before DDL, makes migrations and compare-and-swap unsafe.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys=ON")
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:  # the switch to WAL does not wait for others as statements do
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("adaptory_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _migrate(db: Database) -> None:
    with db.engine.connect() as connection:
        if _revision(connection) == HEAD:
            return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    with db._writer.begin() as connection:  # one transaction: a killed migration leaves the old schema
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        if (revision := _revision(connection)) == HEAD:
            return  # somebody else was quicker
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise DatabaseError(
                f"The database {db.where} has schema {revision}, which this version of Adaptory does not know.",
                hint="A newer version has changed it: upgrade this one, or use another ADAPTORY_HOME.",
            ) from error


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _room(where: str) -> int:
    """Free bytes on the disk of a SQLite file; as many as anybody could want where that cannot be asked."""
    try:
        return shutil.disk_usage(Path(make_url(where).database or "").parent).free
    except OSError:
        return 1 << 62


def _typed(error: DBAPIError, where: str) -> DatabaseError:
    said = (str(error.orig or error).strip() or type(error).__name__).splitlines()[0]
    if "locked" in said:
        hint = "Another process holds it for long: wait, or look for one that hangs."
    elif "full" in said or "disk I/O error" in said:  # a full disk is an I/O error where SQLite maps its shared memory
        full = "full" in said or _room(where) < _LITTLE_BYTES
        state = "is full: free some space" if full else "fails: look at its state (dmesg, quotas)"
        hint = f"The disk that holds it {state} and repeat; nothing half-written is kept."
    elif "readonly" in said or "unable to open" in said:
        hint = "Give this user write access, or point ADAPTORY_HOME or ADAPTORY_DATABASE_URL elsewhere."
    else:
        hint = "Check ADAPTORY_DATABASE_URL and that the database is up."
    return DatabaseError(f"The database {where} cannot be used: {said}.", hint=hint, url=where)
