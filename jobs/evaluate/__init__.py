"""Measures a model on rows it never saw: answers are generated greedily and scored."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.data import TestRow
from jobs.evaluate.answers import BASE, Candidate, answer
from jobs.evaluate.metrics import score
from orchestrator.runs.result import AnswerSample, EvaluationResult
from orchestrator.spec.job import EvaluateSpec

__all__ = ["BASE", "Candidate", "answer", "compare"]

_SAMPLES = 10


def compare(spec: EvaluateSpec, rows: Sequence[TestRow], before: list[str], after: list[str]) -> EvaluationResult:
    """Score both models' answers and keep a few side by side."""
    expected = [row.answer for row in rows]
    samples = [
        AnswerSample(prompt=str(row.messages[-1].get("content") or ""), expected=row.answer, before=b, after=a)
        for row, b, a in zip(rows[:_SAMPLES], before, after, strict=False)
    ]
    return EvaluationResult(
        rows=len(rows),
        before=score(spec.metrics, expected, before),
        after=score(spec.metrics, expected, after),
        samples=samples,
    )
