"""Sources → tokenised rows in the node's cache: once for each combination of data, tokenizer and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from jobs.data.formats import Message
from jobs.data.render import Renderer, tokenizer_digest
from jobs.data.report import DataReport
from jobs.data.rows import TokenizedRows
from jobs.data.sources import source_identity, source_name
from jobs.data.tokenise import REPORT, SPLIT_INDEX, TEST, TRAIN, TRAIN_INDEX, VALIDATION, Tokeniser
from orchestrator.errors import StoreError
from orchestrator.spec.job import DataSpec
from orchestrator.spec.resolved import DataSource, ResolvedData
from orchestrator.store import Store

_LAYOUT = 1  # raise it when the same data would give other tokens or files


@dataclass(frozen=True)
class TestRow:
    """A row to answer and to compare with."""

    __test__ = False  # it is no test case, whatever pytest thinks of its name

    messages: list[Message]
    """Rendered with a generation prompt."""
    tools: list[dict[str, Any]] | None
    answer: str


@dataclass(frozen=True)
class PreparedData:
    train: TokenizedRows
    validation: TokenizedRows | None
    test: list[TestRow]
    report: DataReport


def prepare(
    data: ResolvedData,
    spec: DataSpec,
    *,
    tokenizer: Any,
    max_length: int,
    store: Store,
    cache: Path,
    progress: Callable[[int], None] | None = None,
) -> PreparedData:
    """Render and tokenise all rows, or find them in `cache`. Processes of one node share the work: the first does it.

    Args:
        max_length: longest example in tokens; `spec.too_long` says what happens to a longer one.
        cache: directory on the node's own disk.
        progress: called with the number of rows done so far; not called when the tokens are cached.

    Raises:
        DataError: data that cannot be read, or from which nothing can be learned.
        ModelError: the tokenizer cannot render it.
        StoreError: a stored file is missing, or the cache cannot be written.
    """
    directory = cache / "tokens" / _key(data, spec, tokenizer, max_length)
    if not directory.is_dir():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{directory}.lock"):
                if not directory.is_dir():
                    Tokeniser(spec, Renderer(tokenizer), max_length, store, cache, progress).fill(directory, data)
        except OSError as error:
            raise StoreError(
                f"The cache {directory.parent} cannot be written: {error.strerror or error}.",
                hint="Free some disk space, or point ADAPTORY_HOME to a larger disk.",
                path=str(directory),
            ) from error
    return _open(directory)


def _key(data: ResolvedData, spec: DataSpec, tokenizer: Any, max_length: int) -> str:
    validation = data.validation if isinstance(data.validation, float) else _identities(data.validation)
    options = [spec.format, spec.system, spec.too_long, spec.limit, max_length]
    parts = [_LAYOUT, _identities(data.train), validation, _identities(data.test), options, tokenizer_digest(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _identities(sources: list[DataSource]) -> list[list[str]]:
    return [[source_name(source), source_identity(source)] for source in sources]


def _open(directory: Path) -> PreparedData:
    train, validation = directory / TRAIN, directory / VALIDATION
    held_out: TokenizedRows | None = None
    if (directory / SPLIT_INDEX).is_file():
        rows = TokenizedRows(train, np.load(directory / TRAIN_INDEX))
        held_out = TokenizedRows(train, np.load(directory / SPLIT_INDEX))
    else:
        rows = TokenizedRows(train)
        held_out = TokenizedRows(validation) if validation.is_file() else None
    with (directory / TEST).open(encoding="utf-8") as lines:
        test = [TestRow(**json.loads(line)) for line in lines]
    report = DataReport.model_validate_json((directory / REPORT).read_text(encoding="utf-8"))
    return PreparedData(rows, held_out, test, report)
