"""The gateway's state: quotas, API keys, usage, shared limits, routes with their revisions, change counters."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0001"

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
IN_USE = sa.text("revoked_at IS NULL AND replaced_by IS NULL")
QUOTAS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")


def upgrade() -> None:
    for quota in QUOTAS:
        op.add_column("tenants", sa.Column(quota, sa.Integer()))
    op.create_table(
        "counters",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_counters"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(120), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("revoked_at", sa.Double()),
        sa.Column("replaced_by", sa.String(16)),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_api_keys_tenant_tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_index(
        "uq_api_keys_tenant_name",
        "api_keys",
        ["tenant", "name"],
        unique=True,
        sqlite_where=IN_USE,
        postgresql_where=IN_USE,
    )
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("hour", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("route", sa.String(200), nullable=False),
        sa.Column("adapter", sa.String(80), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("tokens_in", sa.BigInteger(), nullable=False),
        sa.Column("tokens_out", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_usage_tenant_tenants"),
        sa.PrimaryKeyConstraint("tenant", "hour", "route", "adapter", name="pk_usage"),
    )
    op.create_index("ix_usage_hour", "usage", ["hour"])
    op.create_table(
        "usage_writers",
        sa.Column("writer", sa.String(120), nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("written_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("writer", name="pk_usage_writers"),
    )
    op.create_table(
        "limits",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("requests", sa.Double(), nullable=False),
        sa.Column("tokens", sa.Double(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_limits_tenant_tenants"),
        sa.PrimaryKeyConstraint("tenant", name="pk_limits"),
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("holder", sa.String(120), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_reservations_tenant_tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_reservations"),
    )
    op.create_index("ix_reservations_tenant", "reservations", ["tenant"])
    op.create_index("ix_reservations_holder", "reservations", ["holder"])
    op.create_table(
        "routes",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_routes_tenant_tenants"),
        sa.PrimaryKeyConstraint("tenant", "name", name="pk_routes"),
    )
    op.create_table(
        "route_revisions",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("revision", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("config", JSON, nullable=False),
        sa.Column("restores", sa.Integer()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(120), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "name"], ["routes.tenant", "routes.name"], name="fk_route_revisions_tenant_name_routes"
        ),
        sa.PrimaryKeyConstraint("tenant", "name", "revision", name="pk_route_revisions"),
    )


def downgrade() -> None:
    new = ("route_revisions", "routes", "reservations", "limits", "usage_writers", "usage", "api_keys", "counters")
    for table in new:
        op.drop_table(table)
    for quota in QUOTAS:
        op.drop_column("tenants", quota)
