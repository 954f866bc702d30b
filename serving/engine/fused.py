"""A step on a CPU: torch's matmuls, and `serving.engine.kernels` for everything between them.

Computes what `Decoder.forward` does with the same weights. What torch needs some forty operations a layer for are nine
here, since with few tokens an operation costs more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

import numpy as np
import torch
from torch import Tensor

from orchestrator.modeling.attention import AttentionShape
from orchestrator.modeling.decoder import Decoder, Layer, kept_segments
from orchestrator.modeling.lora import Segment
from serving.engine.attention import KeyValueCache, Span, StepAttention
from serving.engine.kernels import Kernels
from serving.engine.linears import ServedLinear, Update


class FusedAttention(StepAttention):
    """Sequences that decode go through the kernel, chunks of prompts as in `StepAttention`.

    Args:
        spans: those with a single new token first.
    """

    def __init__(self, kernels: Kernels, cache: KeyValueCache, spans: Listed[Span], kv_heads: int, heads_per_key: int):
        self.kernels = kernels
        self.single = sum(span.count == 1 for span in spans)
        super().__init__(cache, spans, kv_heads, heads_per_key, others=self.single)
        decoding = spans[: self.single]
        assert all(span.count == 1 for span in decoding)
        self._blocks = torch.tensor([block for span in decoding for block in span.blocks], dtype=torch.int32)
        self._starts = torch.tensor(np.cumsum([0, *(len(span.blocks) for span in decoding)]), dtype=torch.int32)
        self._lengths = torch.tensor([span.length for span in decoding], dtype=torch.int32)

    def attend(self, layer: int, qkv: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
        """As `StepAttention.__call__`, with the keys and values in the cache already."""
        out = qkv.new_empty(len(qkv), shape.heads * shape.head_dim)
        if self.single:
            self.kernels.attend(
                qkv, out, self.cache.memory[layer], self._blocks, self._starts, self._lengths, shape.heads,
                self.cache.size, window, shape.scale, shape.softcap
            )  # fmt: skip
        for group in self.groups:
            rows = slice(None) if group.rows is None else group.rows
            out[rows] = self._attend(group, layer, qkv[rows], shape, window)
        return out


class LoraTable:
    """Where each slot's updates of one linear are, as the kernel reads it."""

    _ROW = np.dtype([("a", "u8"), ("b", "u8"), ("rank", "i4"), ("start", "i4"), ("size", "i4"), ("unused", "i4")])

    def __init__(self, linear: ServedLinear):
        self._projections = linear.projections
        self._rows = np.zeros((8, len(self._projections)), self._ROW)
        self.most_rank = 0
        """Of any update that ever was in it."""

    @property
    def address(self) -> int:
        return self._rows.ctypes.data

    def put(self, slot: int, updates: Listed[Update]) -> None:
        """
        Args:
            updates: somebody else keeps them alive; none: the slot's adapter does not target this linear.
        """
        if slot >= len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[slot] = 0
        for update in updates:
            projection, (rank, _) = self._projections[update.projection], update.a.shape
            assert update.a.is_contiguous()
            assert update.b.t().is_contiguous()
            size = projection.stop - projection.start
            row = (update.a.data_ptr(), update.b.data_ptr(), rank, projection.start, size, 0)
            self._rows[slot, update.projection] = row
            self.most_rank = max(self.most_rank, rank)


class FusedLinear:
    """A `ServedLinear`, its adapters by slot."""

    def __init__(self, kernels: Kernels, linear: ServedLinear):
        self._kernels, self._linear = kernels, linear
        self.table = LoraTable(linear)
        self._count = len(linear.projections)
        self._address = self.table.address

    def put(self, slot: int, updates: Listed[Update]) -> None:
        self.table.put(slot, updates)
        self._address = self.table.address

    def __call__(self, x: Tensor, segments: Tensor | None) -> Tensor:
        """[tokens, in] → [tokens, out]

        Args:
            segments: as `Kernels.lora`; None: no token has an adapter.
        """
        y = self._linear.base(x)
        if segments is not None and self.table.most_rank:
            self._kernels.lora(x, y, self._address, self._count, segments, self.table.most_rank)
        return y


class _FusedLayer:
    def __init__(self, layer: Layer, linears: dict[str, FusedLinear], name: str):
        self.attention_norm, self.mlp_norm = layer.attention_norm.weight, layer.mlp_norm.weight
        self.attention_post = None if layer.attention_post_norm is None else layer.attention_post_norm.weight
        self.mlp_post = None if layer.mlp_post_norm is None else layer.mlp_post_norm.weight
        self.qk_norms = (layer.q_norm.weight, layer.k_norm.weight) if layer.q_norm and layer.k_norm else None
        self.qkv, self.o = linears[f"{name}.qkv"], linears[f"{name}.o"]
        self.gate_up, self.down = linears[f"{name}.gate_up"], linears[f"{name}.down"]
        self.shape = layer.shape


class FusedNetwork:
    """
    Args:
        decoder: with `ServedLinear`s in it.
        linears: these, by name.
    """

    def __init__(self, kernels: Kernels, decoder: Decoder, linears: dict[str, ServedLinear]):
        self.kernels, self._decoder, self._architecture = kernels, decoder, decoder.architecture
        self._linears = {name: FusedLinear(kernels, linear) for name, linear in linears.items()}
        self._layers = [
            _FusedLayer(layer, self._linears, f"layers.{n}")  # type: ignore[arg-type]
            for n, layer in enumerate(decoder.layers)
        ]
        self._slots: list[str | None] = []

    def install(self, digest: str, adapter: dict[str, list[Update]]) -> None:
        slot = self._slots.index(None) if None in self._slots else len(self._slots)
        self._slots[slot : slot + 1] = [digest]
        for name, linear in self._linears.items():
            linear.put(slot, adapter.get(name, ()))

    def remove(self, digest: str) -> None:
        slot = self._slots.index(digest)
        self._slots[slot] = None
        for linear in self._linears.values():
            linear.put(slot, ())

    def hidden(self, ids: Tensor, attention: FusedAttention, segments: Listed[Segment], keep: Tensor | None) -> Tensor:
        """As `Decoder.forward`: [tokens] → [kept, hidden_size]."""
        a, k = self._architecture, self.kernels
        mixed = self._mixed(segments)
        x = self._decoder.embedding(ids)
        tables = [rope.table(attention.positions) for rope in a.ropes]
        tables = [(cos.to(x.dtype).float(), sin.to(x.dtype).float()) for cos, sin in tables]
        normed = torch.empty_like(x)
        k.add_norm(x, None, None, normed, self._layers[0].attention_norm, a.norm_eps, a.norm_offset)
        for n, layer in enumerate(self._layers):
            qkv = layer.qkv(normed, mixed).view(len(x), -1, a.head_dim)
            cos, sin = tables[a.rope_of_layer[n]]
            memory = attention.cache.memory[n]
            k.rotate_store(
                qkv, cos, sin, layer.qk_norms, memory, attention.places, a.num_heads, a.norm_eps, a.norm_offset
            )
            context = attention.attend(n, qkv, layer.shape, a.windows[n])
            last = n == len(self._layers) - 1
            if last and keep is not None:
                x, context, normed = x[keep], context[keep], normed[: len(keep)]
                mixed = self._mixed(kept_segments(segments, keep))
            after = self._decoder.norm.weight if last else self._layers[n + 1].attention_norm
            attended = layer.o(context, mixed)
            k.add_norm(x, attended, layer.attention_post, normed, layer.mlp_norm, a.norm_eps, a.norm_offset)
            fed = layer.down(k.gate(layer.gate_up(normed, mixed), a.activation), mixed)
            k.add_norm(x, fed, layer.mlp_post, normed, after, a.norm_eps, a.norm_offset)
        return normed

    def _mixed(self, segments: Listed[Segment]) -> Tensor | None:
        """Segments with adapters, as `Kernels.lora` takes them."""
        rows = [
            (self._slots.index(s.slot), s.start, s.stop) for s in segments if s.slot is not None and s.stop > s.start
        ]
        return torch.tensor(rows, dtype=torch.int32) if rows else None
