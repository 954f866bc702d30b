"""Tokenised rows on disk: Arrow files, memory-mapped, so that neither writing nor reading needs the whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Tokens:
    """One training example."""

    ids: np.ndarray
    """int32[n]"""
    loss_mask: np.ndarray
    """bool[n]: whether token i is a target, that is, predicted from the tokens before it with loss."""

    @property
    def labelled(self) -> int:
        """Targets; the first token is predicted from nothing, so it never counts."""
        return int(np.count_nonzero(self.loss_mask[1:]))

    def without_tail(self) -> Tokens:
        """Without what follows the last target (white space, unlearned turns): no target can see it."""
        targets = np.flatnonzero(self.loss_mask)
        return self.truncated(int(targets[-1]) + 1) if len(targets) else self

    def truncated(self, length: int) -> Tokens:
        return Tokens(self.ids[:length], self.loss_mask[:length])


_SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "labelled": pa.int32(),
        "digest": pa.uint64(),  # of the row that the example came from
    }
)


class RowWriter:
    """Writes batches of examples to an Arrow file; use it as a context manager."""

    def __init__(self, path: Path):
        self._writer = pa.ipc.new_file(str(path), _SCHEMA)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, examples: Sequence[tuple[Tokens, int]]) -> None:
        """Append examples, each with its row's digest, as one record batch."""
        if not examples:
            return
        offsets = pa.array(np.cumsum([0, *(len(tokens.ids) for tokens, _ in examples)]), pa.int32())
        ids = pa.array(np.concatenate([tokens.ids for tokens, _ in examples]), pa.int32())
        masks = pa.array(np.concatenate([tokens.loss_mask for tokens, _ in examples]))
        columns = [
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, masks),
            pa.array([tokens.labelled for tokens, _ in examples], pa.int32()),
            pa.array([digest for _, digest in examples], pa.uint64()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))


class TokenizedRows:
    """Examples of an Arrow file in the order of `index`; pickles as its path, for workers on the same node.

    Args:
        path: what a `RowWriter` wrote.
        index: int[n], which of its examples, in which order; all when left out.
    """

    def __init__(self, path: Path, index: np.ndarray | None = None):
        self._path, self._index = path, index
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        sizes = [batch.num_rows for batch in self._batches]
        self._starts = np.cumsum([0, *sizes])
        self.lengths = self._column(lambda batch: np.diff(batch.column("ids").offsets.to_numpy()))
        """int32[rows], in tokens."""
        self.labelled = self._column(lambda batch: batch.column("labelled").to_numpy())
        """int32[rows], tokens that carry loss, counted on shifted labels."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokens:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        row = int(self._index[index]) if self._index is not None else index
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, at = self._batches[number], row - int(self._starts[number])
        # copies, since torch wants arrays that it may write to and the file is mapped read-only
        ids = np.array(batch.column("ids")[at].values)
        return Tokens(ids, batch.column("loss_mask")[at].values.to_numpy(zero_copy_only=False))

    def __reduce__(self) -> tuple[type, tuple[Path, np.ndarray | None]]:
        return type(self), (self._path, self._index)

    def digests(self) -> np.ndarray:
        """uint64[rows]: the digest of the row behind each example."""
        return self._column(lambda batch: batch.column("digest").to_numpy())

    def _column(self, read: Callable[[pa.RecordBatch], np.ndarray]) -> np.ndarray:
        parts = [read(batch) for batch in self._batches]
        whole = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return whole if self._index is None else whole[self._index]
