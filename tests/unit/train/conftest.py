"""Rows that need no tokenizer, and ranks that need no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from jobs.data.rows import Tokens
from jobs.train.setup import Place
from orchestrator.errors import AdaptoryError


@dataclass
class MadeRows:
    """`jobs.train.packing.Rows` in memory."""

    rows: list[Tokens] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Tokens:
        return self.rows[row]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.ids) for row in self.rows])

    @property
    def labelled(self) -> np.ndarray:
        return np.array([row.labelled for row in self.rows])


@pytest.fixture
def make_rows() -> Callable[..., MadeRows]:
    """`make_rows(lengths, seed=0)`: random tokens; about half carry loss, the last one always, the first one too."""

    def make(lengths: Sequence[int], seed: int = 0) -> MadeRows:
        random = np.random.default_rng(seed)
        rows = []
        for length in lengths:
            mask = random.random(length) < 0.5
            mask[[0, -1]] = True  # a first token with loss must never be a label: nothing precedes it
            rows.append(Tokens(random.integers(4, 250, length).astype(np.int32), mask))
        return MadeRows(rows)

    return make


@pytest.fixture
def as_ranks() -> Callable[[int, Callable[[Place], Any]], list[Any]]:
    """`as_ranks(2, work)` calls `work(place)` on a thread for each rank, with a sum over the threads as their collective:
    what each returned, or the AdaptoryError that it raised."""

    def run(workers: int, work: Callable[[Place], Any]) -> list[Any]:
        meet = threading.Barrier(workers, timeout=30)
        handed_in: dict[int, torch.Tensor] = {}

        def of(rank: int) -> Any:
            def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
                handed_in[rank] = tensor
                meet.wait()
                total = torch.stack([handed_in[other] for other in range(workers)]).sum(0)
                meet.wait()
                return total

            try:
                return work(Place(rank=rank, workers=workers, all_reduce=all_reduce))
            except AdaptoryError as error:
                return error

        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(of, range(workers)))

    return run
