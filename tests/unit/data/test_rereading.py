"""Rows read again as words: which ones, in what shape, and how much is read. About a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.data import PreparedData, TestRow, example_rows, prepare, rereading, resolve, validation_rows
from jobs.data.formats import Message
from orchestrator.spec.job import DataSpec
from orchestrator.spec.resolved import ResolvedData
from orchestrator.store import Store

Write = Callable[..., Path]


def chat(number: int, *before: Message) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Which land is {number}?"}, {"role": "assistant", "content": f"L{number}"}]
    return {"messages": [*before, *messages]}


class Given:
    """What is there of a spec's data once it is prepared."""

    def __init__(self, tmp_path: Path, tokenizer: Any, spec: DataSpec):
        self.places: dict[str, Any] = {"store": Store(str(tmp_path / "store")), "cache": tmp_path / "cache"}
        self.spec = spec
        self.data: ResolvedData = resolve(spec, store=self.places["store"], base_dir=tmp_path)
        self.prepared: PreparedData = prepare(self.data, spec, tokenizer=tokenizer, max_length=200, **self.places)

    def validation(self, most: int = 1000) -> list[TestRow]:
        return validation_rows(self.data, self.spec, self.prepared, most=most, **self.places)

    def examples(self, most: int, seed: int = 0) -> list[list[Message]]:
        return example_rows(self.data, self.spec, self.prepared, most=most, seed=seed, **self.places)


@pytest.fixture
def given(tmp_path: Path, tokenizer: Any) -> Callable[..., Given]:
    return lambda **spec: Given(tmp_path, tokenizer, DataSpec.model_validate({"train": "train.jsonl"} | spec))


def test_a_fraction_is_asked_as_test_rows_are(given: Any, write: Write) -> None:
    write("train.jsonl", [chat(n) for n in range(300)])
    there = given(validation=0.1, system="Answer.")
    rows = there.validation()
    assert len(rows) == len(there.prepared.validation)
    asked = [row.messages[1]["content"] for row in rows]
    assert asked == sorted(asked, key=lambda text: int(text.split()[-1].rstrip("?"))), "in the order of the file"
    assert rows[0].messages[0] == {"role": "system", "content": "Answer."}
    assert all(row.answer == "L" + row.messages[1]["content"].split()[-1].rstrip("?") for row in rows)
    assert there.validation(most=3) == rows[:3]


def test_a_file_of_validation_rows_is_read_itself(given: Any, write: Write) -> None:
    write("train.jsonl", [chat(n) for n in range(20)])
    write("validation.jsonl", [chat(100), chat(100), chat(101)])
    rows = given(validation="validation.jsonl").validation()
    assert [row.answer for row in rows] == ["L100", "L101"], "each once"


def test_what_was_left_out_for_its_length_is_not_asked(given: Any, write: Write) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "no"}]}
    write("train.jsonl", [chat(1), chat(2)])
    write("validation.jsonl", [long, chat(100)])
    assert [row.answer for row in given(validation="validation.jsonl").validation()] == ["L100"]


def test_plain_text_asks_nothing_and_shows_nothing(given: Any, write: Write) -> None:
    write("train.jsonl", [{"text": f"words {n}"} for n in range(40)])
    there = given(validation=0.2)
    assert there.validation() == []
    assert there.examples(3) == []


def test_without_validation_there_is_nothing(given: Any, write: Write) -> None:
    write("train.jsonl", [chat(n) for n in range(5)])
    assert given(validation=0.0).validation() == []


def test_examples_are_training_rows_drawn_by_the_seed(given: Any, write: Write) -> None:
    write("train.jsonl", [chat(n) for n in range(300)])
    there = given(validation=0.3, system="Answer.")
    drawn = there.examples(5, seed=1)
    assert drawn == there.examples(5, seed=1) != there.examples(5, seed=2)
    assert drawn[:2] == there.examples(2, seed=1) or len(drawn) == 5
    held_out = {row.answer for row in there.validation()}
    for turns in drawn:
        assert [turn["role"] for turn in turns] == ["user", "assistant"]
        assert turns[-1]["content"] not in held_out


def test_what_is_tested_is_no_example(given: Any, write: Write) -> None:
    """Also where the test's row has another system message, or another answer."""
    write("train.jsonl", [chat(n) for n in range(6)])
    other = {
        "messages": [{"role": "system", "content": "s"}, chat(0)["messages"][0], {"role": "assistant", "content": "?"}]
    }
    write("test.jsonl", [other, chat(1), chat(2)])
    shown = given(validation=0.0, test="test.jsonl").examples(6)
    assert {turns[-1]["content"] for turns in shown} == {"L3", "L4", "L5"}


def test_an_example_begins_with_a_question(given: Any, write: Write) -> None:
    system, greeting = {"role": "system", "content": "s"}, {"role": "assistant", "content": "Hello."}
    write("train.jsonl", [chat(0, system, greeting), chat(1, system), chat(2)])
    shown = given(validation=0.0).examples(3)
    assert {turns[-1]["content"] for turns in shown} == {"L1", "L2"}


def test_no_more_is_read_than_examples_are_drawn_from(
    given: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train.jsonl", [chat(n) for n in range(600)])
    there = given(validation=0.0)
    monkeypatch.setattr(rereading, "_AMONG", 10)
    read = []
    rows = rereading.source_rows
    monkeypatch.setattr(rereading, "source_rows", lambda *a, **b: (read.append(row) or row for row in rows(*a, **b)))
    assert len(there.examples(3)) == 3
    assert len(read) <= 10
