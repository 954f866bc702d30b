"""Rows side by side as one micro-batch, and what the network makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.train.exhausted import memory_ran_out, memory_wanted
from orchestrator.errors import OutOfMemory
from orchestrator.modeling.attention import Documents
from orchestrator.modeling.lora import Segment
from orchestrator.modeling.network import Network


class Rows(Protocol):
    """Tokenised rows: `jobs.data.TokenizedRows`."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Any:
        """`.ids` int32 [tokens], `.loss_mask` bool [tokens]."""

    @property
    def labelled(self) -> np.ndarray:
        """Tokens with a loss, by row."""


@dataclass
class PackedBatch:
    """A micro-batch: whole documents side by side."""

    ids: Tensor
    """[tokens]"""
    documents: Documents
    labels: Tensor
    """[labelled], the token that follows each position of `at`."""
    at: Tensor
    """[labelled], positions in `ids`."""
    token_weights: Tensor
    """[labelled], fp32: 1 / labelled tokens of the whole step."""
    real_tokens: int


def pack(
    rows: Rows, chosen: Sequence[int], labelled: int, device: torch.device | str = "cpu", *, share: bool = False
) -> PackedBatch:
    """Put rows side by side; an empty choice becomes one row without weight, since collectives must stay in step.

    Args:
        labelled: tokens with a loss in the whole step.
        share: let rows that begin alike compute their common beginning once; it changes no result.
    """
    picked = [rows[row] for row in chosen] or [rows[0]]
    shared = common_beginning(picked) if share and len(picked) > 1 else 0
    own = [row.ids[shared:] for row in picked]
    ids = torch.from_numpy(np.concatenate([picked[0].ids[:shared], *own]).astype(np.int64))
    # the label of a position is the next token of its own document, so the first token of a document is never one
    target = [np.append(row.loss_mask[shared + 1 :], False) for row in picked]
    at = torch.from_numpy(np.flatnonzero(np.concatenate([np.zeros(shared, bool), *target])))
    weight = 1.0 / max(1, labelled) if chosen else 0.0
    return PackedBatch(
        ids=ids.to(device),
        documents=Documents([len(row.ids) for row in picked], device, shared=shared),
        labels=ids[at + 1].to(device),
        at=at.to(device),
        token_weights=torch.full((len(at),), weight, device=device),
        real_tokens=sum(len(row.ids) for row in picked) if chosen else 0,
    )


def common_beginning(picked: Sequence[Any]) -> int:
    """Tokens with which all rows begin, as far as none of them has a loss there or on the token after."""
    first = picked[0].ids
    most = min(len(row.ids) for row in picked) - 1
    for row in picked[1:]:
        differs = np.flatnonzero(first[:most] != row.ids[:most])
        most = int(differs[0]) if len(differs) else most
    learned = [np.flatnonzero(row.loss_mask[1:]) for row in picked]  # positions that predict a target
    return min([most, *(int(places[0]) for places in learned if len(places))])


def side_by_side(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Micro-batches one behind the other, as one; a single one stays what it is."""
    if len(batches) == 1:
        return batches[0]
    sizes = np.cumsum([0, *(len(batch.ids) for batch in batches)])
    return PackedBatch(
        ids=torch.cat([batch.ids for batch in batches]),
        documents=Documents.side_by_side([batch.documents for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        at=torch.cat([batch.at + int(start) for batch, start in zip(batches, sizes, strict=False)]),
        token_weights=torch.cat([batch.token_weights for batch in batches]),
        real_tokens=sum(batch.real_tokens for batch in batches),
    )


def forward(model: Network, batch: PackedBatch, slot: str | None, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the step's loss, and each labelled token's own loss.

    Args:
        seed: decides dropout of the adapter; None: torch's own generator does.
    """
    segments = [Segment(slot, 0, len(batch.ids), seed)]
    return model.loss(batch.ids, batch.documents, batch.labels, batch.at, batch.token_weights, segments)


def dropout_seed(*numbers: int) -> int:
    """Dropout is a function of the run's seed, the step, the worker and the micro-batch: a run that resumes repeats it."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def memory_explained(batch: PackedBatch, hint: str | None = None) -> Iterator[None]:
    """Say what to lower when a micro-batch does not fit.

    Args:
        hint: what to do, where it is not the run's own settings that made it large.
    """
    try:
        yield
    except Exception as error:
        if memory_ran_out(error):
            raise _out_of_memory(batch, error, hint) from error
        raise


def _out_of_memory(batch: PackedBatch, error: Exception, hint: str | None) -> OutOfMemory:
    tokens, longest = len(batch.ids), batch.documents.longest
    return OutOfMemory(
        f"Out of memory in a micro-batch of {tokens} tokens (longest row {longest}){memory_wanted(error)}.",
        hint=hint
        or f"Set train.micro_batch_tokens to {max(8, tokens // 2)}"
        + (f", train.max_length to {max(8, longest // 2)}" if longest * 2 > tokens else "")
        + ", or train.gradient_checkpointing: true.",
        tokens=tokens,
        longest=longest,
    )
