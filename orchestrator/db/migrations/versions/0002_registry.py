"""Numbered versions of adapters, aliases, and the audit trail, which the database keeps from being changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

# A run's name is its tenant's alone, so what runs had published until now is version 1 of each name.
FIRST_VERSIONS = """
INSERT INTO adapter_versions (tenant, name, number, digest, run_id, created_at, created_by)
SELECT tenant, name, ROW_NUMBER() OVER (PARTITION BY tenant, name ORDER BY created_at, digest),
       digest, run_id, created_at, 'run ' || run_id
FROM adapters
"""

SQLITE_TRIGGER = """
CREATE TRIGGER audit_no_{verb} BEFORE {verb} ON audit
BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END
"""
POSTGRESQL_FUNCTION = """
CREATE FUNCTION audit_only_added_to() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'the audit trail is only added to'; END $$
"""
POSTGRESQL_TRIGGER = """
CREATE TRIGGER audit_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
FOR EACH STATEMENT EXECUTE FUNCTION audit_only_added_to()
"""


def upgrade() -> None:
    op.create_table(
        "adapter_versions",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("run_id", sa.String(80)),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(120), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_adapter_versions_tenant_tenants"),
        sa.PrimaryKeyConstraint("tenant", "name", "number", name="pk_adapter_versions"),
    )
    op.create_index(
        "uq_adapter_versions_tenant_name_digest", "adapter_versions", ["tenant", "name", "digest"], unique=True
    )
    op.create_index("ix_adapter_versions_digest", "adapter_versions", ["digest"])
    op.create_table(
        "adapter_aliases",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("alias", sa.String(63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "name", "number"],
            ["adapter_versions.tenant", "adapter_versions.name", "adapter_versions.number"],
            name="fk_adapter_aliases_adapter_versions",
        ),
        sa.PrimaryKeyConstraint("tenant", "name", "alias", name="pk_adapter_aliases"),
    )
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(120), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("before", JSON),
        sa.Column("after", JSON),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
    )
    op.create_index("ix_audit_subject", "audit", ["subject"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute(POSTGRESQL_FUNCTION)
        op.execute(POSTGRESQL_TRIGGER)
    else:
        for verb in ("UPDATE", "DELETE"):
            op.execute(SQLITE_TRIGGER.format(verb=verb))
    op.execute(FIRST_VERSIONS)


def downgrade() -> None:
    for table in ("audit", "adapter_aliases", "adapter_versions"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_only_added_to()")
