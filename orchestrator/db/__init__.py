"""The control plane's database: SQLAlchemy 2 models, Alembic migrations, leases. SQLite by default, PostgreSQL by URL.

`open_database(url)` brings the schema up to date and returns a `Database`; `db.read()` and `db.write()` give sessions.
"""

from orchestrator.db.database import Database, open_database

__all__ = ["Database", "open_database"]
