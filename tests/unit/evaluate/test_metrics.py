"""Scores of answers."""

from __future__ import annotations

import pytest

from jobs.evaluate.metrics import METRICS, entity_f1, exact_match, json_valid, score
from orchestrator.spec.job import EvaluateSpec

BOTH = '{"person": ["Ada"], "location": ["London"]}'


@pytest.mark.parametrize(
    ("answers", "expected"), [(["a", "b"], 1.0), ([" a\n", "b"], 1.0), (["a", "c"], 0.5), (["A", ""], 0.0)]
)
def test_exact_match(answers: list[str], expected: float) -> None:
    assert exact_match(["a", "b"], answers) == expected


@pytest.mark.parametrize(
    ("answer", "valid"),
    [("{}", 1), ('[1, "a"]', 1), ("3", 0), ('"text"', 0), ("{} and more", 0), ("", 0), ("{'a': 1}", 0), ("null", 0)],
)
def test_json_valid(answer: str, valid: float) -> None:
    assert json_valid(["{}"], [answer]) == valid


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        (BOTH, 1.0),
        ('{"location": ["London"], "person": ["Ada"]}', 1.0),
        ('{"person": ["Ada"]}', 2 / 3),
        ('{"person": ["Ada", "Ada"], "location": ["London"]}', 4 / 5),
        ('{"person": ["London"], "location": ["Ada"]}', 0.0),
        ('{"person": "Ada"}', 0.0),
        ('{"person": [["Ada"], 1, null]}', 0.0),
        ("no entities", 0.0),
        ("[]", 0.0),
    ],
)
def test_entity_f1_of_one_row(answer: str, f1: float) -> None:
    assert entity_f1([BOTH], [answer]) == pytest.approx(f1)


def test_entity_f1_is_over_all_rows_and_not_a_mean_of_rows() -> None:
    # two right of two found of four wanted
    assert entity_f1([BOTH, BOTH], [BOTH, "{}"]) == pytest.approx(2 * 2 / (2 + 4))


def test_nothing_to_find_and_nothing_found_is_right() -> None:
    assert entity_f1(["{}"], ["{}"]) == 1.0
    assert entity_f1(["{}"], [BOTH]) == 0.0


def test_no_rows_score_nothing() -> None:
    assert exact_match([], []) == json_valid([], []) == 0.0


def test_every_metric_that_a_spec_may_name_exists() -> None:
    names = list(METRICS)
    assert EvaluateSpec.model_validate({"metrics": names}).metrics == names
    assert score(names, [BOTH], [BOTH]) == dict.fromkeys(names, 1.0)
