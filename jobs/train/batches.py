"""Which examples make up each optimiser step, and how they are cut into micro-batches.

Everything is a function of the step number: a resumed run asks for the next step and gets what it would have got, on any
number of workers. Rows form one endless stream of shuffled epochs, cut every `batch_size`; none is skipped or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class Batches:
    """The optimiser steps of a run.

    Args:
        lengths: tokens of each training row.
        batch_size: rows per optimiser step, over all workers.
        epochs: passes over the rows; fractions allowed.
        max_steps: stop there even if epochs remain.
        workers: micro-batches are dealt to this many ranks.
        micro_batch_tokens: most tokens in one forward pass (a longer row goes alone).
        packing: False puts each row in a micro-batch of its own.
        uniform: every step has the same number of micro-batches (DeepSpeed counts them).
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        epochs: float,
        seed: int,
        max_steps: int | None = None,
        workers: int = 1,
        micro_batch_tokens: int = 1024,
        packing: bool = True,
        uniform: bool = False,
    ):
        self._lengths = np.asarray(lengths)
        self._rows_in_total = max(1, round(len(self._lengths) * epochs))
        self.batch_size, self._seed, self._workers = batch_size, seed, workers
        self._tokens, self._packing = micro_batch_tokens, packing
        steps = math.ceil(self._rows_in_total / batch_size)
        self.total_steps = min(steps, max_steps or steps)
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self._uniform = max(self._needed(step) for step in range(self.total_steps)) if uniform else None

    def epoch(self, step: int) -> float:
        """Passes over the rows completed before `step`."""
        return min(step * self.batch_size, self._rows_in_total) / len(self._lengths)

    def ends_epoch(self, step: int) -> bool:
        """Whether a pass over the rows is completed by the last of `step` steps."""
        return step > 0 and math.floor(self.epoch(step)) > math.floor(self.epoch(step - 1))

    def rows(self, step: int) -> list[int]:
        """Row numbers of a step's global batch."""
        first = step * self.batch_size
        stop = min(first + self.batch_size, self._rows_in_total)
        count = len(self._lengths)
        return [int(self._order(position // count)[position % count]) for position in range(first, stop)]

    def micro_batches(self, step: int, rank: int, beside: int = 1) -> list[list[int]]:
        """This rank's row numbers, by micro-batch; every rank gets equally many, and some may be empty.

        Args:
            beside: forward passes that share the token limit. Where every step has the same number of micro-batches, it changes nothing.
        """
        bins = self._uniform or self._needed(step, beside)
        count = bins * self._workers
        filled: list[list[int]] = [[] for _ in range(count)]
        sizes = [0] * count
        for row in sorted(self.rows(step), key=lambda r: (-int(self._lengths[r]), r)):
            smallest = min(range(count), key=lambda b: (sizes[b], b))
            filled[smallest].append(row)
            sizes[smallest] += int(self._lengths[row])
        return filled[rank :: self._workers]

    def _needed(self, step: int, beside: int = 1) -> int:
        """Micro-batches per rank so that none is much above its share of the token limit."""
        rows = self.rows(step)
        if not self._packing:
            return math.ceil(len(rows) / self._workers)
        return math.ceil(int(self._lengths[rows].sum()) * beside / (self._tokens * self._workers))

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
