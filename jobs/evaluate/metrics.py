"""Scores of generated answers against expected ones, each in 0..1."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


def exact_match(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Share of answers that are the expected text, white space at the ends aside."""
    return _mean(e.strip() == a.strip() for e, a in zip(expected, answers, strict=True))


def json_valid(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Share of answers that are one JSON object or array and nothing else."""
    return _mean(isinstance(_parsed(answer), dict | list) for answer in answers)


def entity_f1(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Micro-averaged F1 over (type, entity) pairs of `{"type": ["entity", …]}`; what is no such JSON has found nothing.

    Counted with multiplicity, over all rows, as in CoNLL-2003 (https://aclanthology.org/W03-0419).
    """
    found = right = wanted = 0
    for e, a in zip(expected, answers, strict=True):
        truth, said = _entities(e), _entities(a)
        right += (truth & said).total()
        found += said.total()
        wanted += truth.total()
    return 2 * right / (found + wanted) if found + wanted else 1.0


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "json_valid": json_valid,
    "entity_f1": entity_f1,
}


def score(names: Sequence[str], expected: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    return {name: round(METRICS[name](expected, answers), 4) for name in names}


def _mean(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _entities(text: str) -> Counter[tuple[str, str]]:
    parsed = _parsed(text)
    if not isinstance(parsed, dict):
        return Counter()
    return Counter(
        (kind, entity)
        for kind, listed in parsed.items()
        if isinstance(listed, list)
        for entity in listed
        if isinstance(entity, str)
    )
