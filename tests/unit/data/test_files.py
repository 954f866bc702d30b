"""Rows of each file type, and every way in which a file can be wrong: the message names file and line. Under a second."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
from pathlib import Path
from typing import IO, Any

import pytest

from jobs.data.files import file_rows
from orchestrator.errors import DataError

ROWS = [{"prompt": f"question {n}, with ü", "completion": f"answer {n}"} for n in range(3)]


def read(content: bytes | str, name: str) -> list[tuple[dict[str, Any], int]]:
    stream = io.BytesIO(content.encode() if isinstance(content, str) else content)
    return [(row, where.line) for row, where in file_rows(stream, name)]


DEEP = 600, 3_000, 100_000
BAD_JSON = [
    *(('{"a": ' + "[" * deep + "]" * deep + "}", "values are nested more than 100 levels deep") for deep in DEEP),
    ('{"a": ' * 101 + "1" + "}" * 101, "values are nested more than 100 levels deep"),
    ('{"b": {"a": 1, "c": 2, "a": 1}}', "an object has 'a' twice"),
    (f'{{"a": {"9" * 5000}}}', "a number has more than 4,300 digits"),
]
JSON_FILES = [("a.jsonl", '{"a": 1}\nROW\n', 2), ("a.json", '[{"a": 1},\nROW]', 2), ("b.json", "\n\nROW", 3)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_json_lines_with_byte_order_mark_and_blank_lines() -> None:
    content = "\ufeff" + lines(ROWS[:1]) + "\n  \n" + lines(ROWS[1:])
    assert read(content, "a.jsonl") == [(ROWS[0], 1), (ROWS[1], 4), (ROWS[2], 5)]


@pytest.mark.parametrize(
    ("content", "expected_lines"),
    [
        (json.dumps(ROWS), [1, 1, 1]),
        (json.dumps(ROWS, indent=1), [2, 6, 10]),
        (json.dumps({"data": ROWS, "version": 2}, indent=1), [3, 7, 11]),
        (json.dumps({"version": 2, "data": ROWS}), [1, 1, 1]),
        (lines(ROWS), [1, 2, 3]),
    ],
    ids=["array", "indented", "data first", "data last", "lines in a .json"],
)
def test_json_in_each_layout(content: str, expected_lines: list[int]) -> None:
    assert read(content, "a.json") == list(zip(ROWS, expected_lines, strict=True))


def test_json_values_across_chunk_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.data.files._CHUNK", 7)
    rows = [{"text": "ü" * n, "nested": {"list": [1, 2.5, None, True, "]}"]}} for n in range(20)]
    found = read(json.dumps(rows, indent=1, ensure_ascii=False), "a.json")
    assert [row for row, _ in found] == rows
    assert [line for _, line in found] == list(range(2, 2 + 20 * 12, 12))


def test_csv_with_quotes_and_line_breaks() -> None:
    content = 'prompt,completion\n"a, b","c\nd"\ne,f\n'
    assert read(content, "a.csv") == [
        ({"prompt": "a, b", "completion": "c\nd"}, 3),
        ({"prompt": "e", "completion": "f"}, 4),
    ]
    assert read(content.replace(",", "\t"), "a.tsv")[1][0] == {"prompt": "e", "completion": "f"}


def test_csv_with_a_space_after_each_comma() -> None:
    assert read('prompt, completion\nq, "a, b"\n', "a.csv") == [({"prompt": "q", "completion": "a, b"}, 2)]
    assert read("prompt,completion\nq, a\n", "a.csv") == [
        ({"prompt": "q", "completion": " a"}, 2)
    ]  # a space that is meant


def test_rows_may_be_as_deep_as_any_template_can_write() -> None:
    row = {"a": json.loads("[" * 99 + "1" + "]" * 99)}
    assert read(json.dumps(row), "a.jsonl") == [(row, 1)]


def test_parquet_counts_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read((tmp_path / "a.parquet").read_bytes(), "a.parquet") == [(row, n) for n, row in enumerate(ROWS, 1)]


def test_text_is_one_row_a_line() -> None:
    assert read("one\n\ntwo\n", "a.txt") == [({"text": "one"}, 1), ({"text": "two"}, 3)]


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", lines(ROWS) + '{"prompt": "x",\n', 4, "broken JSON at column"),
        ("a.jsonl", lines(ROWS) + "[1]\n", 4, "must be a JSON object, not an array"),
        ("a.jsonl", lines(ROWS).encode() + b'{"prompt": "\xe9"}', 4, "byte 0xe9 is not UTF-8"),
        ("a.jsonl", "\ufeffx".encode("utf-16-le"), 1, "UTF-16"),
        ("a.json", json.dumps(ROWS, indent=1)[:-30], 12, "ends in the middle"),
        ("a.json", '[{"a": 1},\n{"a" 1}]', 2, "Expecting ':'"),
        ("a.json", '[{"a": 1}\n{"a": 1}]', 2, "expected ',' or ']'"),
        ("a.json", '[{"a": 1},\n]', 2, "a comma before the end"),
        ("a.json", '[{"a": 1},\n3]', 2, "not a number"),
        ("a.json", '[{"a": 1}]\n]', 2, "after the end of the array"),
        ("a.json", '\n"text"', 2, "expected an array"),
        ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', 2, "byte 0xe9 is not UTF-8"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", 3, "3 fields where the header has 2"),
        ("a.csv", "a,a\n1,2\n", 1, "repeated column name"),
        ("a.csv", 'a,b\n1,"2\n', 2, "broken CSV"),
        ("a.csv", b"a,b\n1,\xe9\n", 2, "not UTF-8"),
        ("a.csv", "a,b\n1\n", 2, "1 field where the header has 2"),
        ("a.csv", "a;b\n1;2\n", 1, "is one column, and looks parted by ';'"),
        ("a.tsv", "a,b\n1,2\n", 1, "is one column, and looks parted by ','"),
        *(
            (name, content.replace("ROW", row), line, said)
            for name, content, line in JSON_FILES
            for row, said in BAD_JSON
        ),
    ],
)
def test_damage_is_named_with_its_line(name: str, content: bytes | str, line: int, message: str) -> None:
    with pytest.raises(DataError, match=name) as caught:
        read(content, name)
    assert caught.value.context["line"] == line
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(name: str, content: str) -> None:
    if name == "a.csv":
        content = content and "a,b\n"
    with pytest.raises(DataError, match=f"{name} is empty"):
        read(content, name)


def test_an_empty_json_array_is_refused() -> None:
    with pytest.raises(DataError, match="is empty"):
        read("[]", "a.json")


def test_damaged_parquet() -> None:
    with pytest.raises(DataError, match=r"a\.parquet is damaged"):
        read(b"PAR1 this is not parquet PAR1", "a.parquet")


def test_unknown_suffix_lists_the_known() -> None:
    with pytest.raises(DataError, match=r"'\.xlsx' are not read") as caught:
        read(b"", "a.xlsx")
    assert ".parquet" in str(caught.value.hint)


class _Counting(io.RawIOBase):
    """An endless file that counts what was taken from it."""

    def __init__(self, piece: bytes) -> None:
        self._piece, self._rest, self.taken = piece, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest += self._piece * (len(buffer) // len(self._piece) + 1)
        buffer[:], self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        self.taken += len(buffer)
        return len(buffer)


@pytest.mark.parametrize(
    ("name", "piece"), [("a.jsonl", b'{"text": "abc"}\n'), ("a.json", b'{"text": "abc"}\n'), ("a.csv", b"text,more\n")]
)
def test_rows_come_without_reading_to_the_end(name: str, piece: bytes) -> None:
    endless = _Counting(piece)
    stream: IO[bytes] = io.BufferedReader(endless)
    first = list(itertools.islice(file_rows(stream, name), 1000))
    assert len(first) == 1000
    assert endless.taken < 3 * 2**20


def test_truncated_compression_is_damage(tmp_path: Path) -> None:
    from jobs.data.sources import local_rows

    for name, data in (
        ("a.jsonl.gz", gzip.compress(lines(ROWS).encode())),
        ("b.jsonl.bz2", bz2.compress(lines(ROWS).encode())),
    ):
        whole, cut = tmp_path / name, tmp_path / f"cut-{name}"
        whole.write_bytes(data)
        cut.write_bytes(data[: len(data) // 2])
        assert [row for row, _ in local_rows(whole, name)] == ROWS
        with pytest.raises(DataError, match="damaged"):
            list(local_rows(cut, name))


@pytest.mark.parametrize("folder", ["My Data", "100%20", "a::b", "ü [1]*"])
def test_a_path_may_hold_any_character(tmp_path: Path, folder: str) -> None:
    from jobs.data.sources import local_rows

    path = tmp_path / folder / "rows.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(lines(ROWS).encode()))
    assert [row for row, _ in local_rows(path, path.name)] == ROWS
