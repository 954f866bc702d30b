"""Micro-batches of several lanes in one forward pass, each token under its own lane's adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from jobs.train.packing import PackedBatch, memory_explained, side_by_side
from orchestrator.modeling.lora import Segment
from orchestrator.modeling.network import Network


@dataclass(frozen=True)
class Part:
    """One lane's micro-batch in a pass."""

    lane: int
    slot: str
    batch: PackedBatch
    seed: int | None = None
    """Of its dropout."""

    @property
    def tokens(self) -> int:
        return len(self.batch.ids)


def joint_passes(
    lanes: Sequence[Sequence[Callable[[], Part]]], tokens: int, most: int | None = None
) -> Iterator[list[Part]]:
    """Which micro-batches go together: each lane's in their order, one of a lane in a pass.

    Lanes with the most still to come go first, or one of them would be left with nobody to go with.

    Args:
        lanes: what each has to compute; made when its turn comes.
        tokens: most in a pass; a micro-batch that is larger goes alone.
        most: lanes in a pass.
    """
    coming = [list(reversed(parts)) for parts in lanes]
    heads = {number: parts.pop()() for number, parts in enumerate(coming) if parts}
    while heads:
        chosen: list[int] = []
        room = tokens
        for number in sorted(heads, key=lambda n: (-len(coming[n]), -heads[n].tokens, n)):
            if most is not None and len(chosen) == most:
                break
            if not chosen or heads[number].tokens <= room:
                chosen.append(number)
                room -= heads[number].tokens
        yield [heads[number] for number in sorted(chosen)]
        for number in chosen:
            del heads[number]
            if coming[number]:
                heads[number] = coming[number].pop()()


def run(network: Network, parts: Sequence[Part], backward: Callable[[Tensor], None] | None = None) -> list[Tensor]:
    """One pass.

    The loss is a sum over lanes, and none of its terms depends on another lane's adapter: each gets the gradient of its own.
    What is not finite in one lane stays there, since every token's way through the network is its own document's.

    Args:
        backward: is given the sum of the lanes' shares of their steps' losses.

    Returns:
        Each labelled token's loss, by part.

    Raises:
        OutOfMemory: with what to lower.
    """
    batch = side_by_side([part.batch for part in parts])
    borders = np.cumsum([0, *(part.tokens for part in parts)]).tolist()
    segments = [
        Segment(part.slot, start, stop, part.seed)
        for part, start, stop in zip(parts, borders[:-1], borders[1:], strict=True)
    ]
    hint = "Lower sweep.max_concurrent, or set sweep.placement: one_by_one." if len(parts) > 1 else None
    with memory_explained(batch, hint):
        loss, losses = network.loss(batch.ids, batch.documents, batch.labels, batch.at, batch.token_weights, segments)
        if backward is not None:
            backward(loss)
    return list(losses.split([len(part.batch.labels) for part in parts]))
