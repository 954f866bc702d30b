"""Run states: OpenAI's names, with their legal transitions and what Ray's job states mean for them. And the states of trials."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def words(self) -> str:
        """`has succeeded`, `is running`, …: after a run's name."""
        ended = {RunState.SUCCEEDED: "has succeeded", RunState.FAILED: "has failed"}
        return ended.get(self, "is being prepared" if self is RunState.VALIDATING_FILES else f"is {self.value}")

    @property
    def final(self) -> bool:
        """Whether nothing will happen any more unless a person asks for it."""
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)

    @property
    def active(self) -> bool:
        """Whether an attempt is, or is about to be, on the cluster."""
        return self in (RunState.VALIDATING_FILES, RunState.QUEUED, RunState.RUNNING)

    def may_become(self, other: RunState) -> bool:
        return other in _TRANSITIONS[self]


_ENDS = {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}

_TRANSITIONS: dict[RunState, set[RunState]] = {
    RunState.VALIDATING_FILES: {RunState.QUEUED, RunState.RUNNING, RunState.PAUSED, *_ENDS},
    RunState.QUEUED: {RunState.RUNNING, RunState.PAUSED, *_ENDS},
    RunState.RUNNING: {RunState.PAUSED, *_ENDS},
    RunState.PAUSED: {RunState.QUEUED, RunState.CANCELLED},
    RunState.SUCCEEDED: set(),
    RunState.FAILED: {RunState.QUEUED},  # resumed from its last checkpoint
    RunState.CANCELLED: {RunState.QUEUED},
}


class TrialState(StrEnum):
    """Of one trial of a sweep."""

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    """Before its end: by the scheduler, by a person, or by the budget; its message says who."""
    DIVERGED = "diverged"
    """Its loss is no number any more, or has exploded; its neighbours go on."""
    FAILED = "failed"

    @property
    def over(self) -> bool:
        return self not in (TrialState.PENDING, TrialState.RUNNING)
