"""The LoRA layer: a frozen linear plus the low-rank updates of one or many adapters, in one autograd function.

Tokens are grouped in segments by adapter; each segment costs one pair of small matmuls, so ranks may differ and adapters
never mix. Used by training and serving alike. A linear may stand for several of the model's projections side by side
(q, k and v read the same input), each with its own update.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraShape:
    """Shape of one adapter's updates, the same in every linear that it targets."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    targets: frozenset[str] | None = None
    """Projection names (`q_proj`, …) or full module names; None: all."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def covers(self, module: str) -> bool:
        """Whether a module, by its full name, gets an update; a short name matches the last part, as in PEFT."""
        return self.targets is None or any(module == t or module.endswith(f".{t}") for t in self.targets)


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `stop` belong to the adapter in `slot`; None: to the base alone."""

    slot: str | None
    start: int
    stop: int
    seed: int | None = None
    """Decides what dropout takes from these tokens, whatever else is in the batch; None: torch's own generator does."""


class FrozenWeight(Protocol):
    """A weight that is not kept as a plain tensor (4 bits): it is unpacked for each use and never saved unpacked."""

    shape: torch.Size
    device: torch.device

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """[out, in]."""


@dataclass(frozen=True)
class Projection:
    """One of the model's own linears inside a fused one."""

    name: str
    """Full name in the Hugging Face model: `model.layers.0.self_attn.q_proj`."""
    start: int
    """First of its output features."""
    stop: int


@dataclass(frozen=True)
class _Update:
    """Where one segment's update reads and writes; the tensors travel beside it, so that autograd sees them."""

    segment: slice
    scale: float
    dropout: float
    seed: int | None
    spans: tuple[tuple[int, int], ...]
    """Output features of each adapted projection; rank rows of A and the same rows of B belong to each in turn."""


@dataclass(frozen=True)
class MadeFrom:
    """What a linear's input was made from, for a backward pass that makes it again: nothing keeps the input until then."""

    source: Tensor
    make: Callable[[Tensor], Tensor]


class _LoraMatmul(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ without a cast or a copy, and without a gradient for a frozen W.

    ZeRO-3 partitions W between forward and backward: what is saved must be the Parameter itself (or the packed weight),
    never anything made from it, or the whole base would stay in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | FrozenWeight,
        bias: Tensor | None,
        updates: tuple[_Update, ...],
        made: MadeFrom | None,
        *ab: Tensor,
    ) -> Tensor:
        plain = weight if isinstance(weight, Tensor) else weight.unpack(x.dtype)
        y = x @ plain.t() if bias is None else torch.addmm(bias, x, plain.t())
        kept: list[Tensor | None] = []
        for update, a, b in zip(updates, ab[::2], ab[1::2], strict=True):
            inputs, mask = _dropped(x[update.segment], update.dropout, update.seed)
            low = inputs @ a.t()  # [segment, projections · rank]
            rank, out = a.shape[0] // len(update.spans), y[update.segment]
            for n, (start, stop, rows) in enumerate(_spans(update)):
                out[:, start:stop].addmm_(low[:, n * rank : (n + 1) * rank], b[rows].t(), alpha=update.scale)
            kept += [low, mask]
        ctx.packed = None if isinstance(weight, Tensor) else weight
        ctx.make = made.make if made else None
        ctx.save_for_backward(made.source if made else x, None if ctx.packed else weight, *ab, *kept)
        ctx.updates = updates
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        updates, dy = ctx.updates, grads[0]
        x, weight, *rest = ctx.saved_tensors
        if ctx.make:
            x = ctx.make(x)
        ab, kept = rest[: 2 * len(updates)], rest[2 * len(updates) :]
        plain = weight if ctx.packed is None else ctx.packed.unpack(dy.dtype)
        dx = dy @ plain if ctx.needs_input_grad[0] else None
        grad_weight = dy.t() @ x if ctx.packed is None and ctx.needs_input_grad[1] else None
        grad_bias = dy.sum(0) if ctx.needs_input_grad[2] else None
        grad_ab: list[Tensor] = []
        for update, a, b, low, mask in zip(updates, ab[::2], ab[1::2], kept[::2], kept[1::2], strict=True):
            rank, out = a.shape[0] // len(update.spans), dy[update.segment]
            grad_low, grad_b = torch.empty_like(low), torch.empty_like(b)
            for n, (start, stop, rows) in enumerate(_spans(update)):
                part = slice(n * rank, (n + 1) * rank)
                grad_low[:, part].addmm_(out[:, start:stop], b[rows], beta=0, alpha=update.scale)
                if x.is_cuda:  # one launch
                    grad_b[rows].addmm_(out[:, start:stop].t(), low[:, part], beta=0, alpha=update.scale)
                else:  # a wide thin product is twice as fast as a tall one
                    grad_b[rows] = (low[:, part].t() @ out[:, start:stop]).t().mul_(update.scale)
            inputs = x[update.segment]
            grad_ab += [grad_low.t() @ (inputs if mask is None else inputs * mask), grad_b]
            if dx is None:
                continue
            if mask is None:
                dx[update.segment].addmm_(grad_low, a)
            else:
                dx[update.segment].addcmul_(grad_low @ a, mask)
        return dx, grad_weight, grad_bias, None, None, *grad_ab


def _dropped(x: Tensor, probability: float, seed: int | None) -> tuple[Tensor, Tensor | None]:
    if probability == 0.0:
        return x, None
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
    mask = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    mask = mask.ge_(probability).div_(1.0 - probability).to(x.dtype)
    return x * mask, mask


def _spans(update: _Update) -> list[tuple[int, int, slice]]:
    """(first feature, last feature, rows of B) of each adapted projection."""
    out, row = [], 0
    for start, stop in update.spans:
        out.append((start, stop, slice(row, row + stop - start)))
        row += stop - start
    return out


@dataclass(frozen=True)
class LoraSlot:
    """One adapter's update of one fused linear, but for its two Parameters.

    A is [projections · rank, in] and B is [sum of out, rank]: the adapted projections' own matrices, stacked.
    """

    projections: tuple[Projection, ...]
    shape: LoraShape

    def update(self, segment: slice, training: bool, seed: int | None) -> _Update:
        spans = tuple((p.start, p.stop) for p in self.projections)
        return _Update(segment, self.shape.scale, self.shape.dropout if training else 0.0, seed, spans)

    def split(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The projections' own A and B (views) by PEFT's names, without its prefix."""
        rank, out, row = self.shape.rank, {}, 0
        for n, p in enumerate(self.projections):
            out[f"{p.name}.lora_A.weight"] = a[n * rank : (n + 1) * rank]
            out[f"{p.name}.lora_B.weight"] = b[row : row + p.stop - p.start]
            row += p.stop - p.start
        return out


class FusedLinear(nn.Module):
    """One or several of the model's linears that read the same input, with adapters in slots.

    Args:
        weight: [out, in], a Parameter or packed.
        bias: [out] or None.
        projections: the model's own linears, in order, covering the output features.
        dtype: of the activations and of the updates.
    """

    def __init__(
        self,
        weight: nn.Parameter | FrozenWeight,
        bias: nn.Parameter | None,
        projections: Sequence[Projection],
        dtype: torch.dtype,
    ):
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.projections = tuple(projections)
        self.out_features, self.in_features = weight.shape
        self.slots: dict[str, LoraSlot] = {}
        self.compute_dtype = dtype
        self._salt = zlib.crc32(self.projections[0].name.encode())

    def add(self, name: str, shape: LoraShape, generator: torch.Generator | None = None) -> bool:
        """Make room for an adapter; False when it targets nothing here.

        A starts as PEFT's does (Kaiming-uniform with a = √5, that is ±1/√in) and B as zero: an update of nothing.
        The Parameters belong to this module itself, since ZeRO-3 gathers a module's own Parameters when it is called.
        """
        chosen = tuple(p for p in self.projections if shape.covers(p.name))
        if not chosen:
            return False
        device = self.weight.device
        bound = 1 / math.sqrt(self.in_features)
        a = torch.rand(len(chosen) * shape.rank, self.in_features, generator=generator).mul_(2 * bound).sub_(bound)
        b = torch.zeros(sum(p.stop - p.start for p in chosen), shape.rank)
        self.slots[name] = LoraSlot(chosen, shape)
        self.register_parameter(f"lora_a_{name}", nn.Parameter(a.to(device, self.compute_dtype)))
        self.register_parameter(f"lora_b_{name}", nn.Parameter(b.to(device, self.compute_dtype)))
        return True

    def remove(self, name: str) -> None:
        if self.slots.pop(name, None):
            delattr(self, f"lora_a_{name}")
            delattr(self, f"lora_b_{name}")

    def parameters_of(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of a slot, stacked."""
        return getattr(self, f"lora_a_{name}"), getattr(self, f"lora_b_{name}")

    def forward(self, x: Tensor, segments: Sequence[Segment], made: MadeFrom | None = None) -> Tensor:
        """[tokens, in] → [tokens, out].

        Args:
            made: x, again; None: it is kept.
        """
        updates: list[_Update] = []
        tensors: list[Tensor] = []
        for segment in segments:
            if segment.slot is not None and (slot := self.slots.get(segment.slot)):
                # each linear draws from a stream of its own, so that one which recomputes draws the same again
                seed = None if segment.seed is None else segment.seed ^ self._salt
                updates.append(slot.update(slice(segment.start, segment.stop), self.training, seed))
                tensors += self.parameters_of(segment.slot)
        return _LoraMatmul.apply(x, self.weight, self.bias, tuple(updates), made, *tensors)
