"""The first rows of a data set as the model will see them, and which of their tokens carry loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from jobs.data.checking import as_list, reference_rows
from jobs.data.formats import Conversation, conversations
from jobs.data.rows import Tokens
from orchestrator.settings import load_settings
from orchestrator.spec.job import DataSpec


class Piece(BaseModel):
    """Neighbouring tokens that all carry loss, or all do not."""

    text: str
    loss: bool
    tokens: int | None = None
    """None without a tokenizer."""


class PreviewRow(BaseModel):
    where: str
    format: str
    example: int = 0
    """Counts the examples of a row from 0; more than one where the template rewrites earlier answers."""
    pieces: list[Piece]
    tokens: int | None = None
    labelled_tokens: int | None = None


def preview(
    spec: DataSpec,
    *,
    tokenizer: Any | None = None,
    rows: int = 3,
    base_dir: Path | None = None,
    cache: Path | None = None,
) -> list[PreviewRow]:
    """The first training rows, rendered by the tokenizer's chat template; without one, as plain messages.

    Raises:
        DataError: data that cannot be read.
        ModelError: the tokenizer cannot render it.
    """
    base_dir, cache = base_dir or Path(), cache or load_settings().cache
    source = chain.from_iterable(reference_rows(reference, base_dir, cache) for reference in as_list(spec.train))
    read = [(row.with_system(spec.system), format) for row, format in islice(conversations(source, spec.format), rows)]
    if tokenizer is None:
        return [PreviewRow(where=str(row.where), format=format, pieces=list(_messages(row))) for row, format in read]
    from jobs.data.render import Renderer  # transformers takes a second to import

    examples = Renderer(tokenizer).tokens([row for row, _ in read])
    return [
        PreviewRow(
            where=str(row.where),
            format=format,
            example=number,
            pieces=list(_runs(tokens, tokenizer)),
            tokens=len(tokens.ids),
            labelled_tokens=tokens.labelled,
        )
        for (row, format), row_examples in zip(read, examples, strict=True)
        for number, tokens in enumerate(row_examples)
    ]


def _messages(row: Conversation) -> Iterator[Piece]:
    if row.text is not None:
        yield Piece(text=row.text, loss=True)
    for message in row.messages:
        yield Piece(text=f"{message['role']}: ", loss=False)
        calls = "".join(f"{call['function']}" for call in message.get("tool_calls", ()))
        learned = message["role"] == "assistant" and message.get("weight") != 0
        yield Piece(text=message["content"] + calls + "\n", loss=learned)


def _runs(tokens: Tokens, tokenizer: Any) -> Iterator[Piece]:
    borders = np.flatnonzero(np.diff(tokens.loss_mask)) + 1
    for run, mask in zip(np.split(tokens.ids, borders), np.split(tokens.loss_mask, borders), strict=True):
        text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Piece(text=text, loss=bool(mask[0]), tokens=len(run))
