"""Rows that need no tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from jobs.data.rows import Tokens


@dataclass
class MadeRows:
    """`jobs.train.loop.Rows` in memory."""

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
