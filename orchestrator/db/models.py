"""Tables. Times are seconds since the epoch, as in events and results; JSON columns hold what pydantic models dump."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from orchestrator.runs.states import RunState

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
# SQLite counts up by itself only in a column declared INTEGER.
Counter = BigInteger().with_variant(Integer(), "sqlite")
# Stored as text, without a CHECK: a new state is then no migration.
State = Enum(RunState, native_enum=False, length=32, values_callable=lambda states: [state.value for state in states])


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class TenantRow(Base):
    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    created_at: Mapped[float] = mapped_column(Double)


class RunRow(Base):
    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(String(80), primary_key=True)
    """`<name>-<6 characters>`."""
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    name: Mapped[str] = mapped_column(String(63))
    state: Mapped[RunState] = mapped_column(State)
    attempt: Mapped[int]
    spec: Mapped[dict[str, Any]] = mapped_column(Json)
    resolved: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """The resolved spec; null until its data is in the store. From then on anybody can send the run to Ray."""
    job_env: Mapped[dict[str, Any] | None] = mapped_column(Json)
    """Environment of the Ray job; never a secret."""
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    adapter: Mapped[str | None] = mapped_column(String(80))
    """Digest of what the run published."""
    submission_id: Mapped[str] = mapped_column(String(100))
    ray_address: Mapped[str | None] = mapped_column(Text)
    """The cluster that the run was sent to; null is the local Ray."""
    created_at: Mapped[float] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)

    __table_args__ = (
        Index("uq_runs_tenant_name", "tenant", "name", unique=True),
        Index("ix_runs_created_at", "created_at"),
    )


class AttemptRow(Base):
    """One Ray job of a run. It is open (`ended_at` null) until Ray says that the job is over: reconciliation's work list."""

    __tablename__ = "attempts"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    submission_id: Mapped[str] = mapped_column(String(100), unique=True)
    state: Mapped[RunState] = mapped_column(State)
    """How far this attempt came."""
    created_at: Mapped[float] = mapped_column(Double)
    ended_at: Mapped[float | None] = mapped_column(Double)

    __table_args__ = (Index("ix_attempts_ended_at", "ended_at"),)


class EventRow(Base):
    __tablename__ = "events"

    seq: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    """Order of arrival, so that reading `after` one never misses a late segment."""
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    event_id: Mapped[str] = mapped_column(String(120))
    created_at: Mapped[float] = mapped_column(Double)
    type: Mapped[str] = mapped_column(String(32))
    level: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(Json)

    __table_args__ = (Index("uq_events_run_id_event_id", "run_id", "event_id", unique=True),)


class SegmentRow(Base):
    """An event segment of the store whose events are all in `events`."""

    __tablename__ = "segments"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(String(400), primary_key=True)


class AdapterRow(Base):
    """An adapter that a run published; the bytes and the truth are in the store. Two tenants may train equal weights."""

    __tablename__ = "adapters"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(80), primary_key=True)
    name: Mapped[str] = mapped_column(String(63))
    run_id: Mapped[str] = mapped_column(String(80))
    base_digest: Mapped[str | None] = mapped_column(String(80))
    rank: Mapped[int | None]
    created_at: Mapped[float] = mapped_column(Double)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    provenance: Mapped[dict[str, Any]] = mapped_column(Json)

    __table_args__ = (Index("ix_adapters_tenant_name", "tenant", "name"), Index("ix_adapters_run_id", "run_id"))


class AdapterVersionRow(Base):
    """A digest under a tenant's name. Equal digests of one name are one version; a number is never used twice."""

    __tablename__ = "adapter_versions"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(String(80))
    run_id: Mapped[str | None] = mapped_column(String(80))
    """Null for an adapter that was trained elsewhere."""
    created_at: Mapped[float] = mapped_column(Double)
    created_by: Mapped[str] = mapped_column(String(120))

    __table_args__ = (
        Index("uq_adapter_versions_tenant_name_digest", "tenant", "name", "digest", unique=True),
        Index("ix_adapter_versions_digest", "digest"),
    )


class AdapterAliasRow(Base):
    """Which version an alias names now; where it stood before is in the audit trail."""

    __tablename__ = "adapter_aliases"

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int]
    updated_at: Mapped[float] = mapped_column(Double)

    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant", "name", "number"],
            ["adapter_versions.tenant", "adapter_versions.name", "adapter_versions.number"],
            name="fk_adapter_aliases_adapter_versions",
        ),
    )


class AuditRow(Base):
    """Who changed what, and when. The database itself refuses to change or remove a row (a trigger of the migration)."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    created_at: Mapped[float] = mapped_column(Double)
    actor: Mapped[str] = mapped_column(String(120))
    action: Mapped[str] = mapped_column(String(64))
    """`<kind>.<verb>`: `alias.move`, `adapter.register`."""
    subject: Mapped[str] = mapped_column(String(200))
    """What was changed, as a person names it: `acme/intents@production`."""
    before: Mapped[Any | None] = mapped_column(Json)
    after: Mapped[Any | None] = mapped_column(Json)

    __table_args__ = (Index("ix_audit_subject", "subject"),)


class LeaseRow(Base):
    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(120), primary_key=True)
    holder: Mapped[str] = mapped_column(String(120))
    expires_at: Mapped[float] = mapped_column(Double)
