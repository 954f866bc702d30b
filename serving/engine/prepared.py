"""An adapter as an engine installs it: all its numbers in one flat buffer, converted and scaled, and where each belongs.

One buffer, since what holds many adapters in memory, or copies one to a device, should handle one object and not hundreds
(vllm#31317). Making it needs no network, only the names and sizes of its linears, so another process can do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orchestrator.errors import AdapterError
from orchestrator.modeling.adapter_files import AdapterConfig, split_name
from serving.engine.linears import Update

Adapter = dict[str, list[Update]]
"""Updates by the name of the linear in the network, `layers.0.qkv`."""


class Place(NamedTuple):
    """Where one of the base model's own linears is in a served network."""

    linear: str
    """Name of the fused linear: `layers.0.qkv`."""
    projection: int
    """Which part of it."""
    out_features: int
    in_features: int


Places = Mapping[str, Place]
"""By the module's name in the base model: `model.layers.0.self_attn.q_proj`."""


class Piece(NamedTuple):
    """One module's update; in the buffer A [rank, in] and then B transposed: [rank, out]."""

    place: Place
    rank: int


@dataclass(frozen=True)
class Prepared:
    pieces: tuple[Piece, ...]
    buffer: Tensor
    """[numbers], in the dtype of the network: of each piece A, and B times the adapter's scale."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.buffer.numel() * self.buffer.element_size()

    def updates(self, device: torch.device) -> Adapter:
        """Views of the buffer on this device: a copy is made only if it lies on another."""
        parts = iter(torch.split(self.buffer.to(device), [n for piece in self.pieces for n in _sizes(piece)]))
        adapter: Adapter = {}
        for (place, rank), a, b in zip(self.pieces, parts, parts, strict=True):
            update = Update(place.projection, a.view(rank, place.in_features), b.view(rank, place.out_features).t())
            adapter.setdefault(place.linear, []).append(update)
        return adapter


def prepare(
    config: AdapterConfig, tensors: Mapping[str, Tensor], places: Places, dtype: torch.dtype, adapter: str
) -> Prepared:
    """
    Args:
        tensors: by PEFT's names.
        adapter: what errors call it.

    Raises:
        AdapterError: it does not fit the base, or a weight is not finite in this dtype: it would spread to whoever
            shares the batch.
    """
    pairs = list(_pairs(config, tensors, places, adapter))
    pieces = tuple(Piece(places[module], len(a)) for module, a, _ in pairs)
    buffer = torch.empty(sum(n for piece in pieces for n in _sizes(piece)), dtype=dtype)
    parts = iter(torch.split(buffer, [n for piece in pieces for n in _sizes(piece)]))
    for (module, a, b), a_part, b_part in zip(pairs, parts, parts, strict=True):
        a_part.view(a.shape).copy_(a)
        b_part.view(b.shape[::-1]).copy_(b.t().float() * config.scale_of(module))
        if not (torch.isfinite(a_part).all() and torch.isfinite(b_part).all()):
            raise _unfit(adapter, f"{module} is not finite", "finite")
    return Prepared(pieces, buffer)


def _pairs(
    config: AdapterConfig, tensors: Mapping[str, Tensor], places: Places, adapter: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (found := split_name(name)) is None:
            raise _unfit(adapter, f"{name!r} is no LoRA tensor", "names")
        sides.setdefault(found[0], {})[found[1]] = tensor
    for module, pair in sides.items():
        if (place := places.get(module)) is None:
            raise _unfit(adapter, f"{module} is no linear of the base", "names")
        if pair.keys() != {"A", "B"}:
            raise _unfit(adapter, f"{module} has lora_{min(pair)} alone", "names")
        a, b, rank = pair["A"], pair["B"], config.rank_of(module)
        shapes = (rank, place.in_features), (place.out_features, rank)
        if (tuple(a.shape), tuple(b.shape)) != shapes:
            raise _unfit(adapter, f"{module} has A {[*a.shape]} and B {[*b.shape]}, not {shapes}", "shape")
        yield module, a, b


def _sizes(piece: Piece) -> tuple[int, int]:
    return piece.rank * piece.place.in_features, piece.place.out_features * piece.rank


def _unfit(adapter: str, what: str, check: str) -> AdapterError:
    return AdapterError(
        f"The adapter {adapter} does not fit: {what}.",
        hint="Serve it on the base that it was trained on.",
        adapter=adapter,
        check=check,
    )
