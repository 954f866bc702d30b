"""When there is a few-shot baseline, when there is none, and what is said of that."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from jobs.data import TestRow
from jobs.train import evaluation
from orchestrator.errors import DataError

EXAMPLE = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
ROWS = [
    TestRow([{"role": "user", "content": "Three?"}], None, "3"),
    TestRow([{"role": "user", "content": "4?"}], None, "4"),
]


@pytest.fixture
def shown(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`shown(3, examples=…, context=…)`: what stands before the questions, and what is said."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))

    def run(few_shot: int | None, examples: Any = (EXAMPLE, EXAMPLE, EXAMPLE), context: int | None = 2048) -> Any:
        def example_rows(*_: Any, most: int, **__: Any) -> Any:
            if isinstance(examples, Exception):
                raise examples
            return list(examples)[:most]

        monkeypatch.setattr(evaluation, "example_rows", example_rows)
        (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
        baseline = None if few_shot is None else SimpleNamespace(few_shot=few_shot)
        asked = SimpleNamespace(baseline=baseline, max_new_tokens=16)
        spec = SimpleNamespace(evaluate=asked, data=None, train=SimpleNamespace(seed=0))
        said: list[str] = []
        session: Any = SimpleNamespace(
            spec=spec, resolved=SimpleNamespace(data=None), store=None, cache=tmp_path,
            say=lambda kind, text, level: said.append(f"{level}: {text}"),
        )  # fmt: skip
        base: Any = SimpleNamespace(path=tmp_path, reference="tiny")
        data: Any = None
        return evaluation._few_shot(session, base, tokenizer, data, ROWS), said

    return run


def test_nobody_asked(shown: Any) -> None:
    assert shown(None) == (None, [])


@pytest.mark.parametrize("context", [2048, None])
def test_as_many_as_were_asked_for(shown: Any, context: int | None) -> None:
    found, said = shown(2, context=context)
    assert (found.counts, said) == ([2, 2], [])


def test_fewer_rows_than_were_asked_for(shown: Any) -> None:
    found, said = shown(5)
    assert found.counts == [3, 3]
    assert said == ["warn: 2 of 2 test rows have fewer than 5 examples before them (3 on average): there are no more."]


def test_a_context_with_room_for_some(shown: Any) -> None:
    found, said = shown(3, context=70)
    assert 0 < max(found.counts) < 3
    assert said[0].endswith("on average): more do not fit into 54 tokens.")


def test_a_context_with_room_for_none(shown: Any) -> None:
    none, said = shown(3, context=16)
    assert none is None
    assert said == [
        "warn: There is no few-shot baseline: with one example, no question fits into 0 tokens and pleases the chat template."
    ]


@pytest.mark.parametrize(
    ("examples", "why"),
    [
        ((), "no training row can stand before a question"),
        (DataError("There is no file s3://gone."), "There is no file s3://gone"),
    ],
)
def test_what_cannot_be_shown_costs_nobody_the_adapter(shown: Any, examples: Any, why: str) -> None:
    assert shown(3, examples=examples) == (None, [f"warn: There is no few-shot baseline: {why}."])
