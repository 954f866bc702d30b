"""Alembic's entry: migrates over the connection, and inside the transaction, that `open_database` hands in."""

from alembic import context

from orchestrator.db.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,  # true for SQLite as well, since we begin transactions ourselves
    render_as_batch=True,
    compare_type=True,
)
context.run_migrations()
