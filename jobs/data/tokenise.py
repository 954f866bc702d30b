"""The work behind `prepare`: rows in, Arrow files, split and report out; one batch of rows in memory at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from jobs.data.formats import Conversation, conversations
from jobs.data.render import Renderer
from jobs.data.report import DataReport, SplitReport, count_rows
from jobs.data.rows import RowWriter, TokenizedRows, Tokens
from jobs.data.sources import source_name, source_rows
from jobs.data.split import in_validation
from orchestrator.errors import DataError
from orchestrator.spec.job import DataSpec
from orchestrator.spec.resolved import DataSource, ResolvedData, StoredFile
from orchestrator.store import Store

TRAIN, VALIDATION, TEST, REPORT = "train.arrow", "validation.arrow", "test.jsonl", "report.json"
TRAIN_INDEX, SPLIT_INDEX = "train.npy", "validation.npy"
"""Which examples of `train.arrow` are for training and which for validation, when it is split by a fraction."""

_BATCH = 256  # conversations tokenised at once


@dataclass(frozen=True)
class _Tokenised:
    """What is remembered of each row while its tokens go to disk."""

    format: str
    digests: np.ndarray
    """uint64[rows], the first eight bytes of each row's SHA-256."""
    dropped: np.ndarray
    """int32[rows], examples left out."""
    truncated: np.ndarray
    """int32[rows], examples cut."""
    kept: np.ndarray
    """bool[rows], whether any example of the row remains."""

    def report(
        self, examples: TokenizedRows, chosen: np.ndarray | None = None, trained: np.ndarray | None = None
    ) -> SplitReport:
        """Counts of the chosen rows (bool[rows], default all), whose examples are given."""
        chosen = np.ones(len(self.digests), bool) if chosen is None else chosen
        counts = count_rows(self.format, self.digests[chosen], trained)
        omissions = {"dropped": int(self.dropped[chosen].sum()), "truncated": int(self.truncated[chosen].sum())}
        return counts.model_copy(update=omissions).with_lengths(examples.lengths, examples.labelled)


class Tokeniser:
    """Args: as for `prepare`."""

    def __init__(
        self,
        spec: DataSpec,
        renderer: Renderer,
        max_length: int,
        store: Store,
        cache: Path,
        progress: Callable[[int], None] | None,
    ):
        self._spec, self._renderer, self._max_length = spec, renderer, max_length
        self._store, self._cache, self._progress = store, cache, progress
        self._rows_done = 0
        self._source_digests: dict[str, Any] = {}

    def fill(self, directory: Path, data: ResolvedData) -> None:
        """Write everything beside `directory`, then give it its name: it is there complete or not at all."""
        partial = Path(tempfile.mkdtemp(prefix=".tmp-", dir=directory.parent))
        try:
            report = self._fill(partial, data)
            (partial / REPORT).write_text(report.model_dump_json(indent=1), encoding="utf-8")
            partial.replace(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _fill(self, partial: Path, data: ResolvedData) -> DataReport:
        train = self._tokenise(data.train, partial / TRAIN, self._spec.limit)
        validation: SplitReport | None = None
        if isinstance(data.validation, float):
            train_report, validation = _split(train, partial, data.validation)
        else:
            train_report = train.report(TokenizedRows(partial / TRAIN))
            if data.validation:
                held_out = self._tokenise(data.validation, partial / VALIDATION)
                validation = held_out.report(TokenizedRows(partial / VALIDATION), trained=train.digests)
        test = self._write_test(data.test, partial / TEST, train.digests)
        sources = {name: f"sha256:{rows.hexdigest()}" for name, rows in self._source_digests.items()}
        for source in chain(data.train, data.test, [] if isinstance(data.validation, float) else data.validation):
            if isinstance(source, StoredFile):
                sources[source.name] = f"sha256:{source.sha256}"
        return DataReport(format=train.format, train=train_report, validation=validation, test=test, sources=sources)

    def _conversations(
        self, sources: list[DataSource], limit: int | None = None
    ) -> Iterator[list[tuple[Conversation, str]]]:
        """Batches of conversations with their format's name, digesting each source as it passes."""
        rows = chain.from_iterable(source_rows(source, store=self._store, cache=self._cache) for source in sources)
        for batch in _batched(islice(conversations(rows, self._spec.format), limit), _BATCH):
            for conversation, _ in batch:
                source = self._source_digests.setdefault(conversation.where.file, hashlib.sha256())
                source.update(conversation.digest())
            yield batch
            self._rows_done += len(batch)
            if self._progress:
                self._progress(self._rows_done)

    def _tokenise(self, sources: list[DataSource], path: Path, limit: int | None = None) -> _Tokenised:
        digests, dropped, truncated, kept = array("Q"), array("i"), array("i"), array("b")
        format, longest = "", 0
        with RowWriter(path) as writer:
            for batch in self._conversations(sources, limit):
                format = batch[0][1]
                rows = [conversation.with_system(self._spec.system) for conversation, _ in batch]
                learnable: list[tuple[Tokens, int]] = []
                for (row, _), examples in zip(batch, self._renderer.tokens(rows), strict=True):
                    usable = fitting(row, examples, self._spec, self._max_length)
                    digests.append(row.number())
                    dropped.append(len(examples) - len(usable))
                    truncated.append(sum(was_cut for _, was_cut in usable))
                    kept.append(bool(usable))
                    longest = max(longest, *(len(tokens.ids) for tokens in examples))
                    learnable += [(tokens, digests[-1]) for tokens, _ in usable]
                writer.add(learnable)
        if not any(kept):
            raise nothing_left(", ".join(map(source_name, sources)), longest, self._spec, self._max_length)
        return _Tokenised(
            format,
            np.array(digests, np.uint64),
            np.array(dropped, np.int32),
            np.array(truncated, np.int32),
            np.array(kept, bool),
        )

    def _write_test(self, sources: list[DataSource], path: Path, trained: np.ndarray) -> SplitReport | None:
        digests, format = array("Q"), ""
        with path.open("w", encoding="utf-8") as out:
            for batch in self._conversations(sources):
                format = batch[0][1]
                for row, _ in batch:
                    digests.append(row.number())
                    messages, answer = row.with_system(self._spec.system).question_and_answer()
                    out.write(json.dumps({"messages": messages, "tools": row.tools, "answer": answer}) + "\n")
        return count_rows(format, np.array(digests, np.uint64), trained) if sources else None


def fitting(row: Conversation, examples: list[Tokens], spec: DataSpec, max_length: int) -> list[tuple[Tokens, bool]]:
    """The row's examples as they are trained on, with whether each was cut; one that teaches nothing is left out.

    Raises:
        DataError: one is too long, and `data.too_long` is `error`.
    """
    out = []
    for tokens in (example.without_tail() for example in examples):
        too_long = len(tokens.ids) > max_length
        if too_long and spec.too_long == "error":
            raise DataError(
                f"{row.where}: the row has {len(tokens.ids)} tokens, more than max_length {max_length}.",
                hint="Raise train.max_length, or set data.too_long to drop or truncate.",
                file=row.where.file,
                line=row.where.line,
                value=len(tokens.ids),
            )
        if too_long and spec.too_long == "drop":
            continue
        tokens = tokens.truncated(max_length) if too_long else tokens
        if tokens.labelled:
            out.append((tokens, too_long))
    return out


def nothing_left(names: str, longest: int, spec: DataSpec, max_length: int) -> DataError:
    """Why no row can be trained on."""
    if longest > max_length and spec.too_long == "drop":
        return DataError(
            f"Every row of {names} is longer than max_length {max_length} tokens (the longest has {longest}).",
            hint="Raise train.max_length, or set data.too_long: truncate.",
            file=names,
            value=longest,
        )
    return DataError(
        f"All tokens of {names} are masked: within the first {max_length} tokens no row has one that the "
        "assistant says.",
        hint="Look at `adaptory data preview`; raise train.max_length if the answers come later.",
        file=names,
    )


def _split(train: _Tokenised, partial: Path, fraction: float) -> tuple[SplitReport, SplitReport | None]:
    """Write which examples are whose, as index files beside the examples."""
    examples = TokenizedRows(partial / TRAIN)
    held_out = in_validation(train.digests, fraction, train.kept)
    if not held_out.any():
        return train.report(examples), None
    is_held_out = np.isin(examples.digests(), train.digests[held_out])
    reports = []
    for name, rows, chosen in ((TRAIN_INDEX, ~held_out, ~is_held_out), (SPLIT_INDEX, held_out, is_held_out)):
        index = np.flatnonzero(chosen)
        np.save(partial / name, index)
        reports.append(train.report(TokenizedRows(partial / TRAIN, index), rows))
    return reports[0], reports[1]


def _batched(items: Iterable[tuple[Conversation, str]], size: int) -> Iterator[list[tuple[Conversation, str]]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
