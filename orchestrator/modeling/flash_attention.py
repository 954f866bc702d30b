"""Attention inside packed documents by torch's flash attention over lengths that vary: the kernel for GPUs, in 16 bits.

Nothing is padded and nothing is laid out anew: queries, keys and values are read where they stand in the packed batch. Only where
documents share a beginning are keys and values gathered, since each document's own must follow the shared ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orchestrator.modeling.documents import Group, places

if TYPE_CHECKING:
    from orchestrator.modeling.attention import AttentionShape


def takes(qkv: Tensor, shape: AttentionShape) -> bool:
    """Whether the kernel computes this: in 16 bits, on a GPU that has it, and without soft capped scores."""
    fits = shape.softcap is None and shape.head_dim % 8 == 0 and shape.head_dim <= 256
    return fits and qkv.dtype in (torch.bfloat16, torch.float16) and _is_there(qkv.device)


@lru_cache
def _is_there(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class VaryingLengths:
    """Where each document's queries and keys stand; made once for a packed batch.

    What documents share counts as a document of its own, and stands before the keys of each.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device | str):
        queries: list[int] = []
        keys: list[int] = []
        rows: list[Tensor] = []
        copies: list[tuple[slice, list[int]]] = []
        for group, documents in zip(groups, places(groups), strict=True):
            span = slice(documents[0].beginning, documents[0].beginning + group.shared)
            common, begins = torch.arange(span.start, span.stop), []
            if group.shared:
                begins.append(sum(keys))
                queries.append(group.shared)
                keys.append(group.shared)
                rows.append(common)
            for document in documents:
                own = document.length - document.shared
                begins.append(sum(keys))
                queries.append(own)
                keys.append(document.length)
                rows += [common, torch.arange(document.start, document.start + own)]
            if group.shared:
                copies.append((span, begins))
        self.queries = _borders(queries, device)
        """[documents + 1], int32: where each one's queries begin, and where the last one's end."""
        self.keys = _borders(keys, device)
        self.most_queries, self.most_keys = max(queries), max(keys)
        self.rows: Tensor | None = None
        """[keys] token of each; None where keys stand as the tokens do."""
        if copies:
            of_key = torch.cat(rows)
            place = torch.empty(sum(queries), dtype=torch.long)
            place[of_key] = torch.arange(len(of_key))
            self.rows, self._place = of_key.to(device), place.to(device)
        self._copies = [
            (span, (torch.tensor(begins)[:, None] + torch.arange(span.stop - span.start)).to(device))
            for span, begins in copies
        ]
        """Of each beginning that documents share: its tokens, and [documents + 1, shared], its keys."""

    def split(self, qkv: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
        """q [tokens, heads, dim], k and v [keys, kv_heads, dim]."""
        if self.rows is None:
            q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
            return q, k, v
        k, v = qkv[:, shape.heads :].index_select(0, self.rows).chunk(2, 1)
        return qkv[:, : shape.heads], k, v

    def joined(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """The gradient of qkv; a shared token's is summed over the documents, in fp32 and always in the same order."""
        if self.rows is None:
            return torch.cat([dq, dk, dv], 1)
        of_keys = torch.cat([dk, dv], 1)
        out = torch.cat([dq, of_keys.index_select(0, self._place)], 1)
        for span, copies in self._copies:
            out[span, dq.shape[1] :] = of_keys[copies].sum(0, dtype=torch.float32).to(out.dtype)
        return out


def _borders(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


class FlashAttention(torch.autograd.Function):
    """qkv [tokens, heads + 2·kv_heads, head_dim] → context [tokens, heads · head_dim]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: VaryingLengths, shape: AttentionShape, window: int | None) -> Tensor:
        out, *more = _attend(*layout.split(qkv, shape), layout, shape.scale, window)
        context = out.flatten(1)
        ctx.layout, ctx.shape, ctx.window = layout, shape, window
        ctx.save_for_backward(qkv, context, *more)
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        qkv, context, *more = ctx.saved_tensors
        layout, shape = ctx.layout, ctx.shape
        of_queries = len(qkv), shape.heads, shape.head_dim
        given, out = grads[0].reshape(of_queries), context.view(of_queries)
        q, k, v = layout.split(qkv, shape)
        gradients = _attend_backward(given, q, k, v, out, more, layout, shape.scale, ctx.window)
        return layout.joined(*gradients), None, None, None


# Called by their own names: `torch.nn.attention.varlen`, which wraps them, is newer than the oldest torch that we allow


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: VaryingLengths, scale: float, window: int | None
) -> tuple[Tensor, ...]:
    """Context, and what the backward pass needs beside it. Where a document has more keys than queries, its queries are the last."""
    out, logsumexp, seed, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, layout.queries, layout.keys, layout.most_queries, layout.most_keys, 0.0, True, False,
        scale=scale, **_sides(window)
    )  # fmt: skip
    return out, logsumexp, seed, unused


def _attend_backward(
    given: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    more: Sequence[Tensor],
    layout: VaryingLengths,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp, seed, unused = more
    with _in_one_order():
        return torch.ops.aten._flash_attention_backward(
            given, q, k, v, out, logsumexp, layout.queries, layout.keys, layout.most_queries, layout.most_keys, 0.0, True,
            seed, unused, scale=scale, **_sides(window)
        )  # fmt: skip


def _sides(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


@contextmanager
def _in_one_order() -> Iterator[None]:
    """Have torch add up the queries' gradients in a fixed order: else a run that resumes would not end with the same bits."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is all written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
