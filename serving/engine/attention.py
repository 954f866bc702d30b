"""The key-value cache, and attention of one step's tokens to it: `Attention` for the decoder of `orchestrator.modeling`.

Keys and values stand in blocks that any sequence may hold. For a step they are gathered, sequence by sequence, into one
contiguous tensor for each group of similar lengths, so that attention is two batched matmuls and a softmax. Decoding a token
and reading a chunk of a prompt are the same computation: a group has some sequences with as many new tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.modeling.architecture import Architecture
from orchestrator.modeling.attention import AttentionShape


class KeyValueCache:
    """Keys and values of every layer in blocks; the operating system gives the memory when a block is first used."""

    def __init__(self, architecture: Architecture, blocks: int, size: int, dtype: torch.dtype, device: torch.device):
        a = architecture
        self.size = size
        shape = (a.num_layers, 2 * a.num_kv_heads, blocks * size, a.head_dim)
        self.memory = torch.zeros(shape, dtype=dtype, device=device)
        """[layers, heads of keys then heads of values, tokens of all blocks, head_dim]"""
        self._gathered = self.memory.new_empty(0)

    def gather(self, layer: int, blocks: Tensor) -> Tensor:
        """One layer's keys and values of these blocks: [2·kv_heads, blocks, size · head_dim], until this is called again.

        Every layer's are gathered into the same memory: fresh pages for each would cost as much as the copy.
        """
        memory = self.memory[layer]
        by_block = memory.view(len(memory), -1, self.size * memory.shape[2])
        needed = len(memory) * len(blocks) * by_block.shape[2]
        if self._gathered.numel() < needed:
            self._gathered = memory.new_empty(2 * needed)
        out = self._gathered[:needed].view(len(memory), len(blocks), by_block.shape[2])
        return torch.index_select(by_block, 1, blocks, out=out)

    def clear(self, blocks: Listed[int]) -> None:
        """Zero what blocks held before: a sequence's padding is read, then masked, and must not be NaN."""
        by_block = self.memory.view(*self.memory.shape[:2], -1, self.size, self.memory.shape[3])
        by_block.index_fill_(2, torch.tensor(blocks, dtype=torch.long, device=self.memory.device), 0)


@dataclass(frozen=True)
class Span:
    """A sequence in a step: its new tokens are the last `count` of the first `length`."""

    blocks: Listed[int]
    length: int
    count: int


@dataclass(frozen=True)
class _View:
    """What one group's queries may see."""

    blocks: Tensor
    """[sequences · longest], blocks in order, sequence by sequence."""
    mask: Tensor
    """Additive, to be broadcast against [kv_heads · sequences, groups · count, keys]."""


@dataclass
class _Group:
    """Sequences of similar length, with equally many new tokens."""

    spans: list[Span]
    rows: Tensor | None
    """[sequences · count] their tokens in the batch; None: all, in order."""
    views: dict[int | None, _View] = field(default_factory=dict)
    """By window."""


class StepAttention:
    """Attention of one step. An `Attention`.

    Args:
        spans: the sequences of the step, in the batch's order.
        heads_per_key: query heads that share a key.
        others: so many spans at the beginning are not attended to here (see `serving.engine.fused`).
    """

    def __init__(self, cache: KeyValueCache, spans: Listed[Span], kv_heads: int, heads_per_key: int, others: int = 0):
        self.cache, self.kv_heads, self.heads_per_key = cache, kv_heads, heads_per_key
        self.device = cache.memory.device
        positions = [range(s.length - s.count, s.length) for s in spans]
        places = [
            s.blocks[p // cache.size] * cache.size + p % cache.size
            for s, new in zip(spans, positions, strict=True)
            for p in new
        ]
        self.positions = torch.tensor([p for new in positions for p in new], device=self.device)
        """[tokens] of each token in its sequence."""
        self.places = torch.tensor(places, device=self.device)
        """[tokens] where each token's key and value go."""
        self.groups = self._grouped(spans, others)

    def __call__(self, layer: int, qkv: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
        self.cache.memory[layer].index_copy_(1, self.places, qkv[:, shape.heads :].transpose(0, 1))
        if len(self.groups) == 1 and self.groups[0].rows is None:
            return self._attend(self.groups[0], layer, qkv, shape, window)
        out = qkv.new_empty(len(qkv), shape.heads * shape.head_dim)
        for group in self.groups:
            out[group.rows] = self._attend(group, layer, qkv[group.rows], shape, window)
        return out

    def _attend(self, group: _Group, layer: int, qkv: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
        """[sequences · count, heads + 2·kv_heads, head_dim] → [sequences · count, heads · head_dim]."""
        n, kv, dim = len(group.spans), shape.kv_heads, shape.head_dim
        count, per_key = len(qkv) // n, self.heads_per_key
        view = self._view(group, window, qkv.dtype)
        keys, values = self.cache.gather(layer, view.blocks).view(2, kv * n, -1, dim)
        queries = qkv[:, : shape.heads].view(n, count, kv, per_key, dim).permute(2, 0, 3, 1, 4)
        queries = queries.reshape(kv * n, per_key * count, dim)
        if shape.softcap is None:
            scores = torch.baddbmm(view.mask, queries, keys.transpose(1, 2), alpha=shape.scale)
        else:
            scores = torch.bmm(queries, keys.transpose(1, 2)).float() * (shape.scale / shape.softcap)
            scores = scores.tanh_().mul_(shape.softcap).add_(view.mask)
        context = torch.bmm(torch.softmax(scores, -1).to(values.dtype), values)
        return context.view(kv, n, per_key, count, dim).permute(1, 3, 0, 2, 4).reshape(len(qkv), -1)

    def _grouped(self, spans: Listed[Span], others: int) -> list[_Group]:
        """Sequences that decode, by length so that none is padded to over twice its own; every chunk by itself."""
        starts = [0]
        for span in spans:
            starts.append(starts[-1] + span.count)
        groups: list[list[int]] = []
        for i in sorted(range(others, len(spans)), key=lambda i: (spans[i].count, spans[i].length)):
            first = spans[groups[-1][0]] if groups else None
            if first and spans[i].count == first.count == 1 and spans[i].length <= max(2 * first.length, _SHORT):
                groups[-1].append(i)
            else:
                groups.append([i])
        if len(groups) == 1 and not others:
            return [_Group(list(spans), None)]
        tokens = [[t for i in sorted(group) for t in range(starts[i], starts[i + 1])] for group in groups]
        return [
            _Group([spans[i] for i in sorted(group)], torch.tensor(rows, device=self.device))
            for group, rows in zip(groups, tokens, strict=True)
        ]

    def _view(self, group: _Group, window: int | None, dtype: torch.dtype) -> _View:
        """Which blocks a group gathers, and what each query sees of them; made once for all layers with this window."""
        if window not in group.views:
            size, spans = self.cache.size, group.spans
            ends = [-(-s.length // size) for s in spans]
            begins = [0 if window is None else max(0, s.length - s.count - window + 1) // size for s in spans]
            longest = max(end - begin for begin, end in zip(begins, ends, strict=True))
            blocks = [
                block
                for s, begin, end in zip(spans, begins, ends, strict=True)
                for block in [*s.blocks[begin:end], *[s.blocks[0]] * (longest - end + begin)]
            ]
            first = torch.tensor(begins, device=self.device)[:, None, None] * size
            length = torch.tensor([s.length for s in spans], device=self.device)[:, None, None]
            count = spans[0].count
            key = first + torch.arange(longest * size, device=self.device)
            query = length - count + torch.arange(count, device=self.device)[:, None]
            hidden = key > query  # padding too: it stands behind the sequence's end
            if window is not None:
                hidden = hidden | (query - key >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))
            # a lone sequence's mask is broadcast over the key heads, several sequences' is laid out like the scores
            mask = mask.repeat(1 if len(spans) == 1 else self.kv_heads, self.heads_per_key if count > 1 else 1, 1)
            group.views[window] = _View(torch.tensor(blocks, device=self.device), mask)
        return group.views[window]


_SHORT = 128  # tokens; sequences up to this length are one group, since a group's own overhead is above their padding
