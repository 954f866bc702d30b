"""`result.json`: the last word of an attempt. Where the store cannot take it, the job prints it instead."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from orchestrator.runs.states import RunState, TrialState


class AnswerSample(BaseModel):
    """One held-out row: what was asked, what was expected, and what the model said before and after training."""

    prompt: str
    expected: str
    before: str
    few_shot: str | None = None
    after: str


class EvaluationResult(BaseModel):
    rows: int
    before: dict[str, float]
    """Metric name → value in 0..1, of the base model."""
    few_shot: dict[str, float] | None = None
    """The same of the base model with worked examples before each question; None: not asked for, or not possible."""
    examples: float = 0.0
    """How many, on average over the rows: fewer than the spec says where a prompt had no room."""
    after: dict[str, float]
    """The same of the fine-tuned model."""
    samples: list[AnswerSample] = []


class TrialResult(BaseModel):
    """What one configuration of a sweep came to."""

    name: str
    """`t01`, `t02`, …"""
    config: dict[str, Any]
    """Field (`train.learning_rate`) → value."""
    state: TrialState
    steps: int = 0
    """Optimiser steps that it took, shared ones too."""
    tokens: int = 0
    """Of the rows in them."""
    epochs: float = 0.0
    metrics: dict[str, float] = Field(default_factory=dict)
    """Last values: `validation_loss`, `train_loss`, and `evaluate.metrics` on the validation rows where one of them decides."""
    seconds: float | None = None
    """From its first step to its last. Trials of a group share their time, so these add up to more than the sweep took."""
    message: str = ""
    """Why it ended before its end."""
    adapter: str | None = None
    """Digest (`sha256:…`), if it was published."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _numbers_only(cls, metrics: Any) -> Any:
        """A loss that is no number is no figure to compare; the state says that it diverged."""
        if not isinstance(metrics, dict):
            return metrics
        return {
            name: value
            for name, value in metrics.items()
            if value is not None and not (isinstance(value, float) and not math.isfinite(value))
        }


class SweepCompute(BaseModel):
    """What a sweep really computed, and what its trials would have cost as runs of their own."""

    steps: int = 0
    """Optimiser steps of all lanes; one that several trials share counts once."""
    tokens: int = 0
    seconds: float = 0.0
    """Of training."""
    separate_steps: int = 0
    """Of all trials one by one, each as far as it came."""
    separate_tokens: int = 0
    unstopped_steps: int | None = None
    """The same if none had been stopped."""
    unstopped_tokens: int | None = None


class SweepResult(BaseModel):
    trials: list[TrialResult]
    """In the order in which they were made."""
    best: str | None = None
    """Name of the winner; None when no trial has reported the metric."""
    metric: str
    mode: Literal["min", "max"]
    placement: str
    """`packed`, `concurrent` or `one_by_one`."""
    why: str = ""
    """Why the trials were placed so, with what was measured."""
    compute: SweepCompute = SweepCompute()

    @property
    def winner(self) -> TrialResult | None:
        return next((trial for trial in self.trials if trial.name == self.best), None)


class RunResult(BaseModel):
    attempt: int
    state: RunState
    """`succeeded`, `failed`, `cancelled` or `paused`."""
    error: dict[str, Any] | None = None
    """`AdaptoryError.to_dict()` when it failed."""
    adapter: str | None = None
    """Digest (`sha256:…`) of the published adapter; for full tuning, of the published weights under `adapters/`."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Last values: `train_loss`, `validation_loss`, `steps`, `tokens`, `tokens_per_second`, `peak_memory_bytes`."""
    evaluation: EvaluationResult | None = None
    sweep: SweepResult | None = None
    """Of a run with many trials; adapter, metrics and evaluation are then the winner's."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Where the time went, by phase."""
    finished_at: float
    """Seconds since the epoch."""


_LAST_WORDS = "adaptory result: "


def last_words(result: RunResult) -> str:
    """The line that a job prints when its store is full or away."""
    return _LAST_WORDS + result.model_dump_json()


def heard(log: str, attempt: int) -> RunResult | None:
    """The result that an attempt printed, if it did."""
    for line in reversed(log.splitlines()):
        if line.startswith(_LAST_WORDS):
            try:
                result = RunResult.model_validate_json(line.removeprefix(_LAST_WORDS))
            except ValidationError:  # cut off: the disk that holds Ray's logs may be full as well
                continue
            if result.attempt == attempt:
                return result
    return None
