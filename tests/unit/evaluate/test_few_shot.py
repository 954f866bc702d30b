"""Examples before a question: which, where and how many; and the base model's answers with them beside the trained one's. fp32; about ten
seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from jobs.data import TestRow
from jobs.data.render import Renderer
from jobs.evaluate import BASE, Candidate, answer, answers, compare, with_examples
from orchestrator.modeling.loading import load_model
from orchestrator.runs.result import EvaluationResult
from orchestrator.spec.job import EvaluateSpec


@pytest.fixture
def base(tiny_model: Any) -> Path:
    return tiny_model("llama")


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def rows(entities_rows: Any) -> list[TestRow]:
    return [TestRow(row["messages"][:-1], None, row["messages"][-1]["content"]) for row in entities_rows[:3]]


@pytest.fixture
def examples(entities_rows: Any) -> list[Any]:
    return [row["messages"][1:] for row in entities_rows[10:13]]


def tokens(tokenizer: Any, row: TestRow) -> int:
    return len(tokenizer(Renderer(tokenizer).prompt(row.messages, row.tools), add_special_tokens=False)["input_ids"])


def test_examples_stand_between_the_system_message_and_the_question(tokenizer: Any, rows: Any, examples: Any) -> None:
    shown = with_examples(tokenizer, rows, examples[:2], 10_000)
    assert (shown.counts, shown.mean) == ([2, 2, 2], 2.0)
    for row, asked in zip(rows, shown.rows, strict=True):
        assert [m["role"] for m in asked.messages] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert asked.messages[1:5] == [*examples[0], *examples[1]]
        assert (asked.messages[0], asked.messages[-1], asked.answer) == (row.messages[0], row.messages[-1], row.answer)
    bare = TestRow(rows[0].messages[1:], None, rows[0].answer)
    assert with_examples(tokenizer, [bare], examples[:1], 10_000).rows[0].messages == [*examples[0], bare.messages[0]]


def test_each_row_has_as_many_as_fit_to_the_token(tokenizer: Any, rows: Any, examples: Any) -> None:
    lengths = [tokens(tokenizer, row) for row in with_examples(tokenizer, rows, examples[:2], 10_000).rows]
    longest = max(lengths)
    assert with_examples(tokenizer, rows, examples[:2], longest).counts == [2, 2, 2]
    fewer = with_examples(tokenizer, rows, examples[:2], longest - 1)
    assert fewer.counts == [1 if length == longest else 2 for length in lengths]
    assert fewer.mean == round(sum(fewer.counts) / 3, 2) < 2
    assert all(tokens(tokenizer, row) < longest for row in fewer.rows)


def test_a_row_without_room_is_asked_as_it_is(tokenizer: Any, rows: Any, examples: Any) -> None:
    for longest in (tokens(tokenizer, rows[0]), 0, -100):
        shown = with_examples(tokenizer, rows[:1], examples, longest)
        assert (shown.rows, shown.counts) == (rows[:1], [0])
    assert with_examples(tokenizer, rows, [], 10_000).counts == [0, 0, 0]
    assert with_examples(tokenizer, [], examples, 10_000).mean == 0.0


def test_a_template_that_takes_one_question_only_is_given_no_example(tokenizer: Any, rows: Any, examples: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}{{ messages[-1].content }}"
    )
    assert with_examples(tokenizer, rows, examples, 10_000).counts == [0, 0, 0]


@pytest.mark.parametrize("plain", [False, True])
def test_all_are_answered_in_one_batch_each_its_own_question(
    base: Path, tokenizer: Any, rows: Any, examples: Any, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(base, dtype=torch.float32, plain=plain).eval()
    shown = with_examples(tokenizer, rows, examples, 10_000).rows
    apart = [answer(model, tokenizer, asked, [BASE], 8)[0] for asked in (rows, shown)]
    engines = []
    if not plain:
        made = answers.EngineCore
        monkeypatch.setattr(answers, "EngineCore", lambda *args: engines.append(made(*args)) or engines[-1])
    assert answer(model, tokenizer, rows, [BASE, Candidate(rows=shown)], 8) == apart
    assert apart[0] != apart[1]
    assert len(engines) == (0 if plain else 1)


def test_what_is_compared_says_how_many_examples_there_were(rows: Any) -> None:
    spec = EvaluateSpec.model_validate({"metrics": ["exact_match"], "baseline": {"few_shot": 3}})
    right, wrong = [row.answer for row in rows], ["no"] * 3
    found = compare(spec, rows, wrong, right, few_shot=[right[0], "no", "no"], examples=2.5)
    assert (found.before, found.few_shot, found.after) == (
        {"exact_match": 0.0},
        {"exact_match": 0.3333},
        {"exact_match": 1.0},
    )
    assert (found.examples, [sample.few_shot for sample in found.samples]) == (2.5, [right[0], "no", "no"])


def test_a_result_of_an_older_version_has_none() -> None:
    old = {"rows": 1, "before": {"m": 0.0}, "after": {"m": 1.0}}
    sample = {"prompt": "p", "expected": "e", "before": "b", "after": "a"}
    found = EvaluationResult.model_validate(old | {"samples": [sample]})
    assert (found.few_shot, found.examples, found.samples[0].few_shot) == (None, 0.0, None)
