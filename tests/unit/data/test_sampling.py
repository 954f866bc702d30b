"""The first rows, tokenised before there is a job. Under a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.data import try_rows
from jobs.data.sampling import ROWS
from orchestrator.errors import DataError, ModelError
from orchestrator.spec.job import DataSpec

Write = Callable[..., Path]
LONG = [{"prompt": f"q{n} " * 40, "completion": f"a{n}"} for n in range(ROWS + 1)]


@pytest.fixture
def tried(
    write: Write, tmp_path: Path, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    def make(rows: list[Any], max_length: int = 60, family: str = "chatml", **options: Any) -> list[str]:
        write("a.jsonl", rows)
        monkeypatch.setattr("jobs.data.sampling.load_tokenizer", lambda directory: make_tokenizer(family))
        spec = DataSpec.model_validate({"train": "a.jsonl", **options})
        return try_rows(spec, tmp_path, max_length=max_length, base_dir=tmp_path, cache=tmp_path)

    return make


def test_rows_of_which_some_fit_pass(tried: Callable[..., list[str]]) -> None:
    assert tried([*LONG[:3], {"prompt": "q", "completion": "a"}]) == []


def test_no_row_fits(tried: Callable[..., list[str]]) -> None:
    with pytest.raises(DataError, match=r"Every row of a\.jsonl is longer than max_length 60 tokens"):
        tried(LONG[:ROWS])
    with pytest.raises(DataError, match=r"Every row of a\.jsonl"):
        tried(LONG, limit=3)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row has"):
        tried(LONG, too_long="error")


def test_more_rows_than_are_looked_at_may_still_fit(tried: Callable[..., list[str]]) -> None:
    [said] = tried(LONG)
    assert said.startswith(f"Every row of the first {ROWS} of a.jsonl is longer")


@pytest.mark.parametrize(
    ("family", "messages", "said"),
    [
        ("gemma", [{"role": "system", "content": "s"}], "System role not supported"),
        ("no_tools", [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "does not write tool calls"),
    ],
)
def test_a_template_that_cannot_write_the_rows(
    tried: Callable[..., list[str]], family: str, messages: list[Any], said: str
) -> None:
    rest = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    given = [*messages, *rest] if messages[0]["role"] == "system" else [*rest, rest[0], *messages]
    with pytest.raises((DataError, ModelError), match=said):
        tried([{"messages": given}], family=family)


def test_what_only_the_job_may_read_is_left_to_it(tmp_path: Path) -> None:
    assert try_rows(DataSpec(train="s3://b/a.jsonl"), tmp_path, max_length=8, base_dir=tmp_path, cache=tmp_path) == []
