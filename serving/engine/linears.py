"""A base model's linears as they are served: weights packed for few tokens, and many adapters' updates at once.

On a CPU with a compiler the updates are `serving.engine.fused`'s; here is what a GPU does, and a CPU without one. Two
measurements decide how (SmolLM2-135M's shapes, bf16, up to 16 tokens, a CPU with AVX-512):
- A matmul with a plain weight rearranges that weight in every call. oneDNN's packed format halves the time.
- One pair of matmuls for each adapter costs six times as much as one pair for all adapters of a step side by side, with
  what belongs to another adapter set to zero in between. So neighbouring segments form a patch as long as the product
  that this wastes stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from orchestrator.modeling.lora import FrozenWeight, FusedLinear, Projection, Segment

_PATCH = 2048
"""Tokens times adapters' ranks up to which segments are one patch: there the waste is as dear as another pair of matmuls."""


@dataclass(frozen=True)
class Update:
    """One adapter's update of one projection: y += (x Aᵀ) Bᵀ."""

    projection: int
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank], times the adapter's scale; its transpose is contiguous."""


@dataclass
class Patch:
    """Neighbouring segments whose updates are computed together."""

    start: int
    stop: int
    slots: tuple[str, ...]
    owners: list[int]
    """Of each token: which of `slots` it uses."""
    device: torch.device
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def mask(self, columns: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[tokens, columns]: 1 where the column belongs to the token's own adapter, 0 elsewhere."""
        if columns not in self._masks:
            of_token = torch.tensor(self.owners, device=self.device)[:, None]
            of_column = torch.tensor(columns, device=self.device)
            self._masks[columns] = (of_token == of_column).to(dtype)
        return self._masks[columns]


class Mixture(list[Segment]):
    """The segments of one step, and the patches that they form.

    Args:
        segments: in the batch's order.
        ranks: the highest rank of each adapter.
    """

    def __init__(self, segments: Iterable[Segment], ranks: dict[str, int], device: torch.device):
        super().__init__(segments)
        self.patches: list[Patch] = []
        for segment in self:
            if segment.slot is None or segment.stop == segment.start:
                continue
            count, last = segment.stop - segment.start, self.patches[-1] if self.patches else None
            if last is not None and last.stop == segment.start and segment.slot not in last.slots:
                slots = (*last.slots, segment.slot)
                if (segment.stop - last.start) * sum(ranks.get(slot, 0) for slot in slots) <= _PATCH:
                    last.owners += [len(last.slots)] * count
                    last.stop, last.slots = segment.stop, slots
                    continue
            self.patches.append(Patch(segment.start, segment.stop, (segment.slot,), [0] * count, device))


class _Stack:
    """Several adapters' updates of one linear side by side.

    Args:
        chosen: updates, and which adapter of the patch each belongs to, ordered by projection.
        projections: of the linear.
    """

    def __init__(self, chosen: Sequence[tuple[Update, int]], projections: Sequence[Projection]):
        self.a = torch.cat([update.a for update, _ in chosen])
        """[columns, in]"""
        self.owners = tuple(owner for update, owner in chosen for _ in range(len(update.a)))
        """Of each column: which adapter of the patch."""
        self.parts: list[tuple[slice, slice, Tensor]] = []
        """Of each projection: its output features, its columns, and B transposed: [rank, out]."""
        column = 0
        for number, projection in enumerate(projections):
            bs = [update.b for update, _ in chosen if update.projection == number]
            if bs:
                b = torch.cat(bs, 1).t().contiguous()
                features = slice(projection.start, projection.stop)
                self.parts.append((features, slice(column, column + len(b)), b))
                column += len(b)

    def add_to(self, y: Tensor, x: Tensor, mask: Tensor | None) -> None:
        """y += (x Aᵀ · mask) Bᵀ"""
        low = x @ self.a.t()
        if mask is not None:
            low.mul_(mask)
        for features, columns, b in self.parts:
            y[:, features].addmm_(low[:, columns], b)


class ServedLinear(nn.Module):
    """Stands where the decoder had a `FusedLinear`, whose weights it shares or has packed.

    Args:
        pack: keep the weight in oneDNN's own format, as a copy.
    """

    def __init__(self, linear: FusedLinear, pack: bool):
        super().__init__()
        self.projections = linear.projections
        self.in_features = linear.in_features
        self.bias = linear.bias
        self._packed = packed(linear.weight.detach()) if pack and isinstance(linear.weight, Tensor) else None
        # a packed weight is all that serving needs: the plain one goes when the decoder does
        self.weight: Tensor | FrozenWeight | None = linear.weight if self._packed is None else None
        self._updates: dict[str, tuple[Update, ...]] = {}
        self._stacks: dict[tuple[str, ...], _Stack | None] = {}

    def load(self, slot: str, updates: Iterable[Update]) -> None:
        self._updates[slot] = tuple(updates)

    def unload(self, slot: str) -> None:
        self._updates.pop(slot, None)
        self._stacks = {slots: stack for slots, stack in self._stacks.items() if slot not in slots}

    def forward(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """[tokens, in] → [tokens, out]."""
        y = self.base(x)
        if not self._updates:
            return y
        patches = segments.patches if isinstance(segments, Mixture) else Mixture(segments, {}, x.device).patches
        for patch in patches:
            stack = self._stack(patch.slots)
            if stack is None:
                continue
            mask = patch.mask(stack.owners, x.dtype) if len(patch.slots) > 1 else None
            stack.add_to(y[patch.start : patch.stop], x[patch.start : patch.stop], mask)
        if len(self._stacks) > 2 * len(patches) + 2:  # only what recent steps used is worth its memory
            del self._stacks[next(iter(self._stacks))]
        return y

    def base(self, x: Tensor) -> Tensor:
        """Without adapters: [tokens, in] → [tokens, out]."""
        if self._packed is not None:
            return packed_linear(x, self._packed, self.bias)
        assert self.weight is not None
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.unpack(x.dtype)
        return x @ weight.t() if self.bias is None else torch.addmm(self.bias, x, weight.t())

    def _stack(self, slots: tuple[str, ...]) -> _Stack | None:
        """None when none of these adapters targets this linear."""
        stack = self._stacks.pop(slots) if slots in self._stacks else self._stacked(slots)
        self._stacks[slots] = stack  # last: it was used last
        return stack

    def _stacked(self, slots: tuple[str, ...]) -> _Stack | None:
        """Projection by projection, and in each adapter by adapter."""
        chosen = sorted(
            ((update, owner) for owner, slot in enumerate(slots) for update in self._updates.get(slot, ())),
            key=lambda pair: pair[0].projection,
        )
        if not chosen:
            return None
        return _Stack(chosen, self.projections)


# --- oneDNN's packed weights ----------------------------------------------------------------------------------------

_TOKENS = 16  # for which the format is chosen; at 256 tokens it is as fast as a plain weight


def packed(weight: Tensor) -> Tensor | None:
    """A copy of [out, in] in oneDNN's format, or None where there is no such thing (another device, a build without it).

    torch has this for its compiler's sake and gives it no public name (torch/_inductor/fx_passes/mkldnn_fusion.py).
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TOKENS)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
