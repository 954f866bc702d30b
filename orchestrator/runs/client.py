"""The seam to Ray's Jobs API. `cluster` implements it over Ray; a composition root hands it in."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol


class JobStatus(StrEnum):
    """Ray's job states."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def final(self) -> bool:
        return self in (JobStatus.STOPPED, JobStatus.SUCCEEDED, JobStatus.FAILED)


class JobClient(Protocol):
    """All methods raise ClusterError when the cluster cannot be reached."""

    def submit(self, submission_id: str, entrypoint: str, *, env: dict[str, str], metadata: dict[str, str]) -> None:
        """Start a job with the project's code; a submission id that exists already is left as it is."""

    def status(self, submission_id: str) -> tuple[JobStatus, str] | None:
        """State and Ray's message, or None when the cluster does not know the job."""

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end the job; no error when it has ended or is unknown."""

    def logs(self, submission_id: str) -> str:
        """What the job's driver printed so far."""

    def describe(self) -> dict[str, Any]:
        """Address, dashboard URL, versions of Ray and Python."""
