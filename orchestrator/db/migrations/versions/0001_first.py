"""First schema: tenants, runs with their attempts, events and segments, adapters, leases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
STATE = sa.String(32)


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String(120), nullable=False),
        sa.Column("holder", sa.String(120), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "adapters",
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("run_id", sa.String(80), nullable=False),
        sa.Column("base_digest", sa.String(80)),
        sa.Column("rank", sa.Integer()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("provenance", JSON, nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_adapters_tenant_tenants"),
        sa.PrimaryKeyConstraint("tenant", "digest", name="pk_adapters"),
    )
    op.create_index("ix_adapters_run_id", "adapters", ["run_id"])
    op.create_index("ix_adapters_tenant_name", "adapters", ["tenant", "name"])
    op.create_table(
        "runs",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("state", STATE, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("resolved", JSON),
        sa.Column("job_env", JSON),
        sa.Column("error", JSON),
        sa.Column("result", JSON),
        sa.Column("adapter", sa.String(80)),
        sa.Column("submission_id", sa.String(100), nullable=False),
        sa.Column("ray_address", sa.Text()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double()),
        sa.Column("finished_at", sa.Double()),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_runs_tenant_tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.create_index("uq_runs_tenant_name", "runs", ["tenant", "name"], unique=True)
    op.create_table(
        "attempts",
        sa.Column("run_id", sa.String(80), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("submission_id", sa.String(100), nullable=False),
        sa.Column("state", STATE, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_attempts_run_id_runs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "number", name="pk_attempts"),
        sa.UniqueConstraint("submission_id", name="uq_attempts_submission_id"),
    )
    op.create_index("ix_attempts_ended_at", "attempts", ["ended_at"])
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("run_id", sa.String(80), nullable=False),
        sa.Column("event_id", sa.String(120), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("level", sa.String(16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_events_run_id_runs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("seq", name="pk_events"),
    )
    op.create_index("uq_events_run_id_event_id", "events", ["run_id", "event_id"], unique=True)
    op.create_table(
        "segments",
        sa.Column("run_id", sa.String(80), nullable=False),
        sa.Column("path", sa.String(400), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_segments_run_id_runs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "path", name="pk_segments"),
    )


def downgrade() -> None:
    for table in ("segments", "events", "attempts", "runs", "adapters", "tenants", "leases"):
        op.drop_table(table)
