"""Measures a model on rows it never saw: answers are generated greedily and scored."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.data import TestRow
from jobs.evaluate.answers import BASE, Candidate, answer
from jobs.evaluate.few_shot import Shown, with_examples
from jobs.evaluate.metrics import score
from orchestrator.runs.result import AnswerSample, EvaluationResult
from orchestrator.spec.job import EvaluateSpec

__all__ = ["BASE", "Candidate", "Shown", "answer", "compare", "with_examples"]

_SAMPLES = 10


def compare(
    spec: EvaluateSpec,
    rows: Sequence[TestRow],
    before: list[str],
    after: list[str],
    few_shot: list[str] | None = None,
    examples: float = 0.0,
) -> EvaluationResult:
    """Score the answers of the base model, of the trained one, and of the base model with examples; and keep a few side by side."""
    expected = [row.answer for row in rows]
    samples = [
        AnswerSample(
            prompt=str(row.messages[-1].get("content") or ""),
            expected=row.answer,
            before=before[number],
            few_shot=None if few_shot is None else few_shot[number],
            after=after[number],
        )
        for number, row in enumerate(rows[:_SAMPLES])
    ]
    return EvaluationResult(
        rows=len(rows),
        before=score(spec.metrics, expected, before),
        few_shot=None if few_shot is None else score(spec.metrics, expected, few_shot),
        examples=examples,
        after=score(spec.metrics, expected, after),
        samples=samples,
    )
