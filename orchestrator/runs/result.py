"""`result.json`: the last word of an attempt. Where the store cannot take it, the job prints it instead."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationError

from orchestrator.runs.states import RunState


class AnswerSample(BaseModel):
    """One held-out row: what was asked, what was expected, and what the model said before and after training."""

    prompt: str
    expected: str
    before: str
    after: str


class EvaluationResult(BaseModel):
    rows: int
    before: dict[str, float]
    """Metric name → value in 0..1, of the base model."""
    after: dict[str, float]
    """The same of the fine-tuned model."""
    samples: list[AnswerSample] = []


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
