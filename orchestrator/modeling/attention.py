"""Attention inside packed documents: causal, and never across the border of two.

Documents of similar length are laid side by side, so that attention is a few batched matmuls; a block-diagonal mask over
the packed row would compute, and on a CPU pay for, everything it masks. There are two kernels: `flash` (for GPUs in 16 bits, in
`flash_attention`), and `matmul` (for the rest, in `matmul_attention`), of batched matmuls that give the same bits each time, and
fp32's own rounding. Soft capped scores take a padded grid, `[documents, longest]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from orchestrator.modeling import flash_attention
from orchestrator.modeling.documents import Group, alike, places, tokens_at
from orchestrator.modeling.matmul_attention import Layout, MatmulAttention

Kernel = Literal["matmul", "flash"]


@dataclass(frozen=True)
class AttentionShape:
    """What attention needs to know of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None


class Attention(Protocol):
    """Gives each token of a flat batch its context. Implemented for packed documents and for decoding with a cache."""

    def __call__(self, layer: int, qkv: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
        """qkv [tokens, heads + 2·kv_heads, head_dim], rotated → context [tokens, heads · head_dim]."""


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length in one grid."""

    documents: int
    longest: int
    rows: Tensor | slice
    """[documents · longest] token of each cell; a slice when there is no padding. A padding cell repeats the last
    token of its document: causality keeps it from being attended to, and its own result is not read."""
    cells: Tensor | None
    """Cell of each token that this bucket gives the result of, in order; None when that is every cell."""
    tokens: Tensor | slice
    """Token of each of those cells."""


class Documents:
    """Layout of a packed batch, made once and used by every layer.

    Documents that begin alike (the same system prompt, mostly) may share that beginning: its tokens stand once, before all
    documents, and every document attends to them. What a causal model computes for them is the same in each document,
    so this changes no result; only their keys' and values' gradients are summed over the documents.

    Args:
        lengths: tokens of each document, in packed order, the shared beginning included.
        shared: tokens that all documents have in common at their beginning, fewer than the shortest document.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        kernel: Kernel | None = None,
        shared: int = 0,
    ):
        assert shared == 0 or shared < min(lengths), "a document must have tokens of its own"
        self.groups = [Group(tuple(lengths), shared)]
        self.kernel: Kernel = kernel or ("matmul" if torch.device(device).type == "cpu" else "flash")
        self.device = device
        self._layouts: dict[tuple[int, int], Layout] = {}

    @classmethod
    def side_by_side(cls, several: Sequence[Documents]) -> Documents:
        """The packed batches one behind the other, as one; each keeps what its own documents share."""
        joined = cls([], several[0].device, several[0].kernel)
        joined.groups = [group for documents in several for group in documents.groups]
        return joined

    @property
    def lengths(self) -> list[int]:
        return [n for group in self.groups for n in group.lengths]

    @property
    def shared(self) -> int:
        """Tokens that stand once for several documents."""
        return sum(group.shared for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)

    @cached_property
    def positions(self) -> Tensor:
        """[tokens], each one's in its document."""
        spans = [span for g in self.groups for span in ((0, g.shared), *((g.shared, n) for n in g.lengths))]
        return torch.cat([torch.arange(*span) for span in spans]).to(self.device)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    def __call__(self, layer: int, qkv: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
        if window is not None and window >= self.longest:
            window = None
        if self.kernel == "flash" and flash_attention.takes(qkv, shape):
            return flash_attention.FlashAttention.apply(qkv, self._varying, shape, window)
        if shape.softcap is None:
            return MatmulAttention.apply(qkv, self._layout(shape), shape, window)
        grids = _Gather.apply(qkv, self._grid)
        return _Scatter.apply(self.tokens, self._grid.buckets, *(_softcapped(grid, shape, window) for grid in grids))

    def _layout(self, shape: AttentionShape) -> Layout:
        """Of the model's heads, which are the same in every layer."""
        heads = shape.heads, shape.kv_heads
        if heads not in self._layouts:
            self._layouts[heads] = Layout(self.groups, *heads, self.device)
        return self._layouts[heads]

    @cached_property
    def _varying(self) -> flash_attention.VaryingLengths:
        return flash_attention.VaryingLengths(self.groups, self.device)

    @cached_property
    def _grid(self) -> _Grid:
        return _laid_out(self.groups, self.device)


@dataclass(frozen=True)
class _Grid:
    """A packed batch by buckets."""

    buckets: list[Bucket]
    beginnings: list[tuple[slice, list[tuple[int, slice]]]]
    """Of each beginning that documents share: its tokens, and (bucket, documents in it) wherever they stand."""


def _laid_out(groups: Sequence[Group], device: torch.device | str) -> _Grid:
    placed = places(groups)
    documents = [document for group in placed for document in group]
    first = {group[0] for group in placed}  # its cells give the shared tokens' result
    buckets: list[Bucket] = []
    members = alike(documents)
    for chosen in members:
        here = [documents[d] for d in chosen]
        longest = max(d.length for d in here)
        contiguous = chosen[-1] - chosen[0] + 1 == len(chosen) and all(d.length == longest for d in here)
        if contiguous and not any(d.shared for d in here):
            whole = slice(here[0].start, here[-1].start + longest)
            buckets.append(Bucket(len(here), longest, whole, None, whole))
            continue
        column = torch.arange(longest)
        rows = tokens_at(here, column).flatten()
        length = torch.tensor([d.length for d in here])[:, None]
        given = torch.tensor([0 if d in first else d.shared for d in here])[:, None]
        cells = ((column < length) & (column >= given)).flatten().nonzero().squeeze(1)
        buckets.append(Bucket(len(here), longest, rows.to(device), cells.to(device), rows[cells].to(device)))
    beginnings: list[tuple[slice, list[tuple[int, slice]]]] = []
    for group in placed:
        if group[0].shared:
            inside = [
                (b, [n for n, d in enumerate(chosen) if documents[d] in group]) for b, chosen in enumerate(members)
            ]
            # documents of a bucket stand in their order in the batch, so those of one group stand together
            spans = [(b, slice(numbers[0], numbers[-1] + 1)) for b, numbers in inside if numbers]
            beginnings.append((slice(group[0].beginning, group[0].beginning + group[0].shared), spans))
    return _Grid(buckets, beginnings)


class _Gather(torch.autograd.Function):
    """Packed tokens into each bucket's grid; padding cells have no gradient, since nothing reads them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, grid: _Grid) -> tuple[Tensor, ...]:
        ctx.grid, ctx.shape = grid, qkv.shape
        return tuple(qkv[b.rows].view(b.documents, b.longest, *qkv.shape[1:]) for b in grid.buckets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out = grads[0].new_empty(ctx.shape)
        for bucket, grad in zip(ctx.grid.buckets, grads, strict=True):
            flat = grad.reshape(-1, *ctx.shape[1:])
            out[bucket.tokens] = flat if bucket.cells is None else flat[bucket.cells]
        for tokens, spans in ctx.grid.beginnings:
            shared = tokens.stop - tokens.start
            out[tokens] = sum(grads[b][documents, :shared].sum(0, dtype=torch.float32) for b, documents in spans)
        return out, None


class _Scatter(torch.autograd.Function):
    """Each bucket's grid back to packed tokens, `[tokens, heads · head_dim]`; the inverse of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, tokens: int, buckets: list[Bucket], *grids: Tensor) -> Tensor:
        ctx.buckets, ctx.shape = buckets, grids[0].shape[2:]
        out = grids[0].new_empty(tokens, grids[0].shape[2] * grids[0].shape[3])
        for bucket, grid in zip(buckets, grids, strict=True):
            flat = grid.reshape(-1, out.shape[1])
            out[bucket.tokens] = flat if bucket.cells is None else flat[bucket.cells]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out = []
        for bucket in ctx.buckets:
            rows = grads[0][bucket.tokens]
            if bucket.cells is not None:
                cells = rows.new_zeros(bucket.documents * bucket.longest, rows.shape[1])
                cells[bucket.cells] = rows
                rows = cells
            out.append(rows.view(bucket.documents, bucket.longest, *ctx.shape))
        return None, None, *out


# --- over a grid: [documents, longest, heads + 2·kv_heads, head_dim] → [documents, longest, heads, head_dim] ---


def _grouped(grid: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """q [n·kv, groups, longest, dim] and k, v [n·kv, longest, dim]: heads that share a key stand together."""
    n, longest, _, dim = grid.shape
    groups = shape.heads // shape.kv_heads
    q, k, v = grid.split([shape.heads, shape.kv_heads, shape.kv_heads], 2)
    q = q.view(n, longest, shape.kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
    return (
        q.reshape(n * shape.kv_heads, groups, longest, dim),
        k.transpose(1, 2).reshape(n * shape.kv_heads, longest, dim),
        v.transpose(1, 2).reshape(n * shape.kv_heads, longest, dim),
    )


def _mask(longest: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask, [longest, longest]."""
    query, key = torch.arange(longest, device=device)[:, None], torch.arange(longest, device=device)[None]
    hidden = key > query
    if window is not None:
        hidden = hidden | (query - key >= window)
    return torch.zeros(longest, longest, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _ungrouped(out: Tensor, documents: int) -> Tensor:
    """[n·kv, groups, longest, dim] → [n, longest, heads, dim]."""
    kv_groups, groups, longest, dim = out.shape
    kv = kv_groups // documents
    out = out.view(documents, kv, groups, longest, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(documents, longest, kv * groups, dim)


def _softcapped(grid: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
    """Scores become cap · tanh(score / cap) (Gemma2), by autograd's own graph."""
    assert shape.softcap is not None
    q, k, v = _grouped(grid, shape)
    scores = torch.einsum("ngqd,nkd->ngqk", q, k) * (shape.scale / shape.softcap)
    scores = torch.tanh(scores) * shape.softcap + _mask(grid.shape[1], window, grid.dtype, grid.device)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(grid.dtype)
    return _ungrouped(torch.einsum("ngqk,nkd->ngqd", weights, v), grid.shape[0])
