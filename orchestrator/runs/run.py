"""A run as the rest of the program sees it: a frozen record, read from the database."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.runs.result import RunResult
from orchestrator.runs.states import RunState


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)


class Run(_Record):
    id: str
    """`<name>-<6 characters>`."""
    tenant: str
    name: str
    state: RunState
    attempt: int
    spec: dict[str, Any]
    """The JobSpec, as JSON: kept readable even when a later version would refuse it."""
    resolved: dict[str, Any] | None
    """The ResolvedSpec; None until its data is in the store."""
    job_env: dict[str, str] | None
    error: dict[str, Any] | None
    """`AdaptoryError.to_dict()`."""
    result: RunResult | None
    """Last word of the present attempt."""
    adapter: str | None
    """Digest of what the run published."""
    submission_id: str
    """Of the present attempt: `<id>-a<attempt>`."""
    ray_address: str | None
    """The cluster it was sent to; None is the local Ray."""
    created_at: float
    started_at: float | None
    finished_at: float | None
    """Times are seconds since the epoch."""

    @property
    def sweeps(self) -> bool:
        """Whether it is a sweep: many trials instead of one fine-tune."""
        return self.spec.get("sweep") is not None

    @property
    def settled(self) -> bool:
        """Whether nothing happens any more unless a person asks for it: final or paused."""
        return self.state.final or self.state is RunState.PAUSED


class Attempt(_Record):
    run_id: str
    number: int
    submission_id: str
    state: RunState
    created_at: float
    ended_at: float | None
    """When Ray's job was seen to be over; None before."""


class AdapterRecord(_Record):
    """What the database knows of an adapter; the truth is in the store."""

    tenant: str
    digest: str
    name: str
    run_id: str | None
    base_digest: str | None
    rank: int | None
    created_at: float
    metrics: dict[str, float]
    provenance: dict[str, Any]
