"""Where the documents of a packed batch stand, and which of them are alike enough to be computed side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Documents that begin alike: their common beginning stands once, before what each has of its own."""

    lengths: tuple[int, ...]
    """Tokens of each document, the common beginning included."""
    shared: int = 0
    """Tokens of that beginning, fewer than the shortest document has."""

    @property
    def tokens(self) -> int:
        return self.shared + sum(n - self.shared for n in self.lengths)


@dataclass(frozen=True)
class Document:
    """Where one document's tokens stand in the packed batch: its own together, those it shares elsewhere."""

    length: int
    """Of the whole document, in tokens."""
    start: int
    """Where its own tokens begin."""
    shared: int = 0
    beginning: int = 0
    """Where the shared ones begin."""


def places(groups: Iterable[Group]) -> list[list[Document]]:
    """Each group's documents, the groups one behind the other."""
    out, start = [], 0
    for group in groups:
        beginning, documents = start, []
        start += group.shared
        for length in group.lengths:
            documents.append(Document(length, start, group.shared, beginning))
            start += length - group.shared
        out.append(documents)
    return out


def tokens_at(documents: Sequence[Document], position: Tensor) -> Tensor:
    """The packed batch's token at each position of each document, the last one's where a document has none any more.

    Args:
        position: [positions].

    Returns:
        [documents, positions].
    """

    def column(numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers))[:, None]

    shared = column(d.shared for d in documents)
    inside = position.minimum(column(d.length - 1 for d in documents))
    own = column(d.start for d in documents) + inside - shared
    return torch.where(inside < shared, column(d.beginning for d in documents) + inside, own)


def alike(documents: Sequence[Document]) -> list[list[int]]:
    """Group documents by length so that little is padded: padding costs time linearly, each group a fixed overhead."""
    groups: list[list[int]] = []
    for d in sorted(range(len(documents)), key=lambda d: -documents[d].length):
        if groups and documents[d].length >= 0.8 * documents[groups[-1][0]].length - 8:
            groups[-1].append(d)
        else:
            groups.append([d])
    return [sorted(group) for group in groups]
