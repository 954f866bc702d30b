"""Rows of one data file, streamed: JSON lines, JSON, CSV, Parquet, plain lines; compressed or not."""

from __future__ import annotations

import codecs
import csv
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from jobs.data.json_text import BadJson, decode, decode_whole
from orchestrator.errors import DataError

_CHUNK = 1 << 20  # characters of JSON read at a time
_COMPRESSED = (".gz", ".bz2", ".xz")


class Where(NamedTuple):
    """The place of a row, for messages."""

    file: str
    line: int
    """From 1; for Parquet and data sets the row's number."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Row = tuple[dict[str, Any], Where]


def file_type(name: str) -> str:
    """Suffix that says how a file is read (`.jsonl` for `a.jsonl.gz`).

    Raises:
        DataError: the suffix is none that is known.
    """
    path = PurePosixPath(name)
    suffix = PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix.lower() not in _READERS:
        raise DataError(
            f"{name}: files ending in {suffix or 'nothing'!r} are not read.",
            hint=f"Convert it to one of {', '.join(_READERS)} (also with {' or '.join(_COMPRESSED)}).",
            file=name,
        )
    return suffix.lower()


def known_type(name: str) -> bool:
    path = PurePosixPath(name)
    suffix = PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    return suffix.lower() in _READERS


def file_rows(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Rows of an uncompressed binary stream, read as its name says; never the whole file at once.

    Raises:
        DataError: empty, damaged, not UTF-8, or a row that is no object; the message names file and line.
    """
    found = False
    try:
        for row in _READERS[file_type(name)](stream, name):
            found = True
            yield row
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:  # pyarrow's are ValueErrors
        if isinstance(error, OSError) and error.errno is not None:  # the disk's or S3's; gzip's and bz2's have none
            raise
        raise DataError(f"{name} is damaged: {error}.", hint="Copy or write it again.", file=name) from error
    if not found:
        raise DataError(f"{name} is empty: there is no row in it.", hint="Check the path.", file=name)


# --- lines ----------------------------------------------------------------------------------------------------------


def _decoded(stream: IO[bytes], name: str) -> Iterator[str]:
    for number, raw in enumerate(stream, 1):
        if number == 1:
            _refuse_utf16(raw, name)
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(name, number, error) from error


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[str, int]]:
    """Lines that are not blank, with their number."""
    for number, line in enumerate(_decoded(stream, name), 1):
        if line := line.strip():
            yield line, number


def _refuse_utf16(head: bytes, name: str) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name} is UTF-16.", hint="Save it as UTF-8.", file=name, line=1)


def _not_utf8(name: str, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{name}:{line}: byte 0x{byte:02x} is not UTF-8.",
        hint="Save the file as UTF-8 (iconv -f LATIN1 -t UTF-8 converts the commonest other one).",
        file=name,
        line=line,
    )


def _json_lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    for line, number in _lines(stream, name):
        try:
            value = decode_whole(line)
        except BadJson as error:
            raise _unusable(error, name, number) from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}:{number}: broken JSON at column {error.colno}: {error.msg}.",
                hint="Each line must be one JSON object; correct or delete this line.",
                file=name,
                line=number,
            ) from error
        yield _object(value, name, number), Where(name, number)


def _unusable(error: BadJson, name: str, line: int) -> DataError:
    return DataError(f"{name}:{line}: {error.what}.", hint=error.hint, file=name, line=line)


def _object(value: Any, name: str, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{name}:{line}: a row must be a JSON object, not {_json_type(value)}.",
            hint='Write it as {"messages": […]}, {"prompt": …, "completion": …} or another known format.',
            file=name,
            line=line,
            value=str(value)[:80],
        )
    return value


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(value), "null")


def _text_lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    for line, number in _lines(stream, name):
        yield {"text": line}, Where(name, number)


# --- JSON -----------------------------------------------------------------------------------------------------------


def _json(stream: IO[bytes], name: str) -> Iterator[Row]:
    """An array of objects, `{"data": [objects]}`, or objects one after the other; one object in memory at a time."""
    text = _JsonText(stream, name)
    if text.peek() == "[":
        text.take("[")
        yield from _array(text, name)
        if text.peek():
            raise text.broken("text after the end of the array")
    elif text.peek() == "{":
        yield from _objects(text, name)
    elif text.peek():
        raise text.broken(f"expected an array of objects, found {text.peek()!r}")


def _array(text: _JsonText, name: str) -> Iterator[Row]:
    while text.peek() != "]":
        line = text.line
        yield _object(text.value(), name, line), Where(name, line)
        if text.peek() == ",":
            text.take(",")
            if text.peek() == "]":
                raise text.broken("a comma before the end of the array")
        elif text.peek() != "]":
            raise text.broken("expected ',' or ']'" if text.peek() else "the file ends in the middle of the array")
    text.take("]")


def _objects(text: _JsonText, name: str) -> Iterator[Row]:
    if text.starts_with_data():
        yield from _array(text, name)
        return
    while text.peek():
        line = text.line
        row = _object(text.value(), name, line)
        if isinstance(row.get("data"), list):  # "data" after other keys: already read whole
            yield from ((_object(item, name, line), Where(name, line)) for item in row["data"])
        else:
            yield row, Where(name, line)


class _JsonText:
    """A cursor over a JSON text that holds only what is being decoded."""

    def __init__(self, stream: IO[bytes], name: str):
        self._stream, self._name = stream, name
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self.line = 1

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self.line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_CHUNK):
                return ""

    def take(self, character: str) -> None:
        assert self.peek() == character
        self._at += 1

    def value(self) -> Any:
        """Decode the next value; a value longer than what is read so far is tried again with twice as much."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = decode(self._text, self._at)
            except BadJson as error:
                raise _unusable(error, self._name, self.line) from error
            except json.JSONDecodeError as error:
                if self._more(size):
                    size *= 2
                    continue
                line = self.line + self._text.count("\n", self._at, error.pos)
                message = "the file ends in the middle of a value" if error.pos >= len(self._text) else error.msg
                raise self.broken(message, line) from error
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def starts_with_data(self) -> bool:
        """Step into `{"data": [` if that is how the text begins, else stay."""
        at, line = self._at, self.line
        self._at += 1
        if self.peek() == '"' and self.value() == "data" and self.peek() == ":":
            self.take(":")
            if self.peek() == "[":
                self.take("[")
                return True
        self._at, self.line = at, line
        return False

    def broken(self, message: str, line: int | None = None) -> DataError:
        line = line or self.line
        return DataError(
            f"{self._name}:{line}: broken JSON: {message}.",
            hint="Correct the file, or write one JSON object per line as .jsonl.",
            file=self._name,
            line=line,
        )

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        raw = self._stream.read(size)
        self._ended = not raw
        if not self._text:
            _refuse_utf16(raw, self._name)
        try:
            added = self._decode_bytes.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at) + error.object[: error.start].count(b"\n")
            raise _not_utf8(self._name, line, error) from error
        keep = self._at if self._at > _CHUNK // 2 else 0  # drop what was consumed, seldom enough to stay linear
        self._text, self._at = self._text[keep:] + added, self._at - keep
        return bool(added) or not self._ended


# --- tables ---------------------------------------------------------------------------------------------------------


def _csv(stream: IO[bytes], name: str, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    lines = _decoded(stream, name)
    first = next(lines, "")
    # `a, b` is a style: only a file that writes its header so means no space at the beginning of its values
    spaced = any(part.startswith(" ") for part in first.split(delimiter))
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    try:
        header = [column.strip() for column in next(reader, [])]
        if not header:
            return
        _refuse_other_delimiter(header, name, delimiter)
        if "" in header or len(set(header)) < len(header):
            raise DataError(
                f"{name}:1: the header {header} has an empty or repeated column name.",
                hint="Name each column once in the first line.",
                file=name,
                line=1,
            )
        for fields in reader:
            if len(fields) != len(header) and fields:
                raise DataError(
                    f"{name}:{reader.line_num}: {len(fields)} field{'s' if len(fields) > 1 else ''} where the header has "
                    f"{len(header)}.",
                    hint="Put text that holds commas or line breaks in double quotes.",
                    file=name,
                    line=reader.line_num,
                )
            if fields:
                yield dict(zip(header, fields, strict=True)), Where(name, reader.line_num)
    except csv.Error as error:
        line = reader.line_num
        raise DataError(
            f"{name}:{line}: broken CSV: {error}.", hint="Check the quotes near this line.", file=name, line=line
        ) from error


def _refuse_other_delimiter(header: list[str], name: str, delimiter: str) -> None:
    others = [mark for mark in ";\t|," if mark != delimiter and mark in header[0]]
    if len(header) == 1 and others:
        raise DataError(
            f"{name}:1: the header {header[0]!r:.80} is one column, and looks parted by {others[0]!r}.",
            hint="A .csv is parted by commas and a .tsv by tabs: save it as one of them.",
            file=name,
            line=1,
        )


def _tsv(stream: IO[bytes], name: str) -> Iterator[Row]:
    return _csv(stream, name, "\t")


def _parquet(stream: IO[bytes], name: str) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield row, Where(name, number)


_READERS: dict[str, Callable[[IO[bytes], str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text_lines,
}
