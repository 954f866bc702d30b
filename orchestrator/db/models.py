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
    text,
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
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    concurrent_requests: Mapped[int | None]
    """Quotas; null is without limit."""
    disabled_at: Mapped[float | None] = mapped_column(Double)
    """Since when its keys are refused; null while they are not."""


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
    """An adapter that was published; the bytes and the truth are in the store. Two tenants may train equal weights."""

    __tablename__ = "adapters"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(80), primary_key=True)
    name: Mapped[str] = mapped_column(String(63))
    run_id: Mapped[str | None] = mapped_column(String(80))
    """Null for an adapter that was trained elsewhere."""
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
    previous: Mapped[int | None]
    """The version that it named before it came to this one; a move back leads to what was before that, too."""
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


class CounterRow(Base):
    """How often something was changed; see `counters`."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)


# --- tenants --------------------------------------------------------------------------------------------------------


_IN_USE = text("revoked_at IS NULL AND replaced_by IS NULL")


class ApiKeyRow(Base):
    """An API key without its secret."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    """The key's public part, by which it is looked up."""
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    name: Mapped[str] = mapped_column(String(63))
    hash: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the whole key, in hexadecimal."""
    scopes: Mapped[list[str]] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Double)
    created_by: Mapped[str] = mapped_column(String(120))
    expires_at: Mapped[float | None] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)
    replaced_by: Mapped[str | None] = mapped_column(String(16))
    """Id of the key that a rotation made; this one lives on for the grace period."""

    __table_args__ = (
        # A name is one key's; those that were revoked or rotated keep theirs for the record.
        Index("uq_api_keys_tenant_name", "tenant", "name", unique=True, sqlite_where=_IN_USE, postgresql_where=_IN_USE),
    )


class UsageRow(Base):
    """What was used in an hour. Added to, never overwritten."""

    __tablename__ = "usage"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    hour: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """Its beginning, in seconds since the epoch."""
    route: Mapped[str] = mapped_column(String(200), primary_key=True)
    """The model's public name: a route, a base, or one adapter version."""
    adapter: Mapped[str] = mapped_column(String(80), primary_key=True)
    """Digest of the adapter that answered; empty when the base did."""
    requests: Mapped[int] = mapped_column(BigInteger)
    tokens_in: Mapped[int] = mapped_column(BigInteger)
    tokens_out: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (Index("ix_usage_hour", "hour"),)


class UsageWriterRow(Base):
    """The last batch that a writer of usage has stored, so that none is counted twice."""

    __tablename__ = "usage_writers"

    writer: Mapped[str] = mapped_column(String(120), primary_key=True)
    batch: Mapped[int] = mapped_column(BigInteger)
    written_at: Mapped[float] = mapped_column(Double)


# --- limits that several gateways share -----------------------------------------------------------------------------


class LimitRow(Base):
    """How full a tenant's buckets were at a moment."""

    __tablename__ = "limits"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    requests: Mapped[float] = mapped_column(Double)
    tokens: Mapped[float] = mapped_column(Double)
    at: Mapped[float] = mapped_column(Double)


class ReservationRow(Base):
    """A request that is being answered. Its gateway renews it; when the gateway dies, it expires."""

    __tablename__ = "reservations"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"))
    holder: Mapped[str] = mapped_column(String(120))
    expires_at: Mapped[float] = mapped_column(Double)

    __table_args__ = (Index("ix_reservations_tenant", "tenant"), Index("ix_reservations_holder", "holder"))


# --- routes ---------------------------------------------------------------------------------------------------------


class RouteRow(Base):
    """A tenant's public model name, and which of its revisions is in force."""

    __tablename__ = "routes"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    revision: Mapped[int]
    """0: it is deleted; its revisions are kept, so that it can be brought back."""
    created_at: Mapped[float] = mapped_column(Double)


class RouteRevisionRow(Base):
    """What a route said from a moment on. Written once, never changed."""

    __tablename__ = "route_revisions"

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    config: Mapped[dict[str, Any]] = mapped_column(Json)
    restores: Mapped[int | None]
    """The revision that a rollback brought back."""
    created_at: Mapped[float] = mapped_column(Double)
    created_by: Mapped[str] = mapped_column(String(120))

    __table_args__ = (ForeignKeyConstraint(["tenant", "name"], ["routes.tenant", "routes.name"]),)
