"""Rows as people wrote them, once more: what became tokens is read again from its sources where its words are wanted.

Tokens are kept for training, and they are all that most runs need. A sweep that chooses by an evaluation metric asks the model its
validation rows, and a few-shot prompt shows it training rows; both want a handful of rows, found by their digests.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from jobs.data.formats import Conversation, Message, conversations
from jobs.data.preparing import PreparedData, TestRow
from jobs.data.rows import TokenizedRows
from jobs.data.sources import source_rows
from orchestrator.spec.job import DataSpec
from orchestrator.spec.resolved import DataSource, ResolvedData
from orchestrator.store import Store

_AMONG = 10_000
"""First training rows that examples are drawn from, so that no more than these are read."""
_SPARE = 4
"""Times as many are drawn as are wanted: some of them cannot be shown."""


def validation_rows(
    data: ResolvedData, spec: DataSpec, prepared: PreparedData, *, most: int, store: Store, cache: Path
) -> list[TestRow]:
    """The first distinct rows that are held out for validation, to be answered; none of plain text, which asks nothing.

    Raises:
        DataError, StoreError: a source cannot be read any more.
    """
    if prepared.validation is None:
        return []
    sources = data.train if isinstance(data.validation, float) else data.validation
    chosen = _distinct(prepared.validation)[:most]
    found = _reread(sources, spec, chosen.tolist(), store=store, cache=cache)
    asked = ((row, *row.with_system(spec.system).question_and_answer()) for row in found if row.text is None)
    return [TestRow(messages, row.tools, answer) for row, messages, answer in asked]


def example_rows(
    data: ResolvedData, spec: DataSpec, prepared: PreparedData, *, most: int, seed: int, store: Store, cache: Path
) -> list[list[Message]]:
    """Training rows to put before a question, without their system message, each from a user's turn to the answer.

    Which ones hangs on the seed alone. What `data.test` asks is not among them.

    Raises:
        DataError, StoreError: a source cannot be read any more.
    """
    candidates = _distinct(prepared.train)[:_AMONG]
    drawn = np.random.default_rng(seed).permutation(candidates)[: _SPARE * most].tolist()
    found = {row.number(): row for row in _reread(data.train, spec, drawn, store=store, cache=cache)}
    tested = {_question(row.messages) for row in prepared.test}
    rows = [found[number] for number in drawn if number in found]
    shown = (row for row in rows if _can_be_shown(row) and _question(row.messages[:-1]) not in tested)
    return [_turns(row.messages) for row in islice(shown, most)]


def _reread(
    sources: list[DataSource], spec: DataSpec, numbers: Collection[int], *, store: Store, cache: Path
) -> Iterator[Conversation]:
    """The rows with these digests, each once, in the order of their sources; reads no further than to the last of them."""
    left = set(numbers)
    rows = chain.from_iterable(source_rows(source, store=store, cache=cache) for source in sources)
    for conversation, _ in conversations(rows, spec.format) if left else ():
        if (number := conversation.number()) in left:  # before it gets the system message, as when it became tokens
            left.remove(number)
            yield conversation
            if not left:
                return


def _distinct(rows: TokenizedRows) -> np.ndarray:
    """uint64[distinct rows], digests in the order in which the rows come first: a row may have several examples."""
    digests = rows.digests()
    return digests[np.sort(np.unique(digests, return_index=True)[1])]


def _can_be_shown(row: Conversation) -> bool:
    return row.text is None and next((m["role"] for m in _turns(row.messages)), None) == "user"


def _turns(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system"]


def _question(messages: list[Message]) -> str:
    return json.dumps(_turns(messages), sort_keys=True)
