"""The plain path: any Hugging Face decoder, one document a forward pass, so that nothing can leak between documents.

Slower than the fused decoder and right for every architecture: recurrent ones, ALiBi, unusual masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.errors import ModelError
from orchestrator.modeling.attention import Documents
from orchestrator.modeling.lora import FusedLinear, Projection, Segment


class _Adapted(nn.Module):
    """Stands where the model had an `nn.Linear`; reads which adapter to use from the decoder around it."""

    def __init__(self, linear: FusedLinear, current: list[str | None]):
        super().__init__()
        self.linear, self._current = linear, current

    @property
    def weight(self) -> Any:
        return self.linear.weight

    @property
    def bias(self) -> Any:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        segments = (Segment(self._current[0], 0, len(flat)),)
        return self.linear(flat, segments).view(*x.shape[:-1], -1)


class PlainDecoder(nn.Module):
    """A transformers decoder whose linears carry LoRA slots.

    Args:
        model: an `AutoModelForCausalLM`; its linears are replaced, its head excepted.
    """

    packs = False
    """Takes one document in one forward pass."""

    def __init__(self, model: Any, quantize: Callable[[Tensor], Any] | None = None):
        super().__init__()
        self._current: list[str | None] = [None]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        head = model.get_output_embeddings()
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        if not found:
            raise ModelError(
                f"{type(model).__name__} has no nn.Linear besides its head, so there is nothing an adapter could target.",
                hint="Use another base model; Llama, Mistral, Qwen2, Qwen3, Gemma2 and Gemma3 run on the fast path.",
                model=type(model).__name__,
            )
        for name, linear in found:
            parent, _, child = name.rpartition(".")
            fused = FusedLinear(
                quantize(linear.weight.detach()) if quantize else nn.Parameter(linear.weight, requires_grad=False),
                linear.bias,
                [Projection(name, 0, linear.out_features)],
                dtype=linear.weight.dtype,
            )
            setattr(model.get_submodule(parent), child, _Adapted(fused, self._current))
        self.model = model
        self.gradient_checkpointing = self._recomputes = False

    @classmethod
    def load(
        cls, directory: Path, *, dtype: torch.dtype, device: Any, quantize: Callable[[Tensor], Any] | None
    ) -> PlainDecoder:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except (ValueError, KeyError, OSError) as error:
            raise ModelError(
                f"{directory} is not a decoder that transformers can load: {str(error).splitlines()[0]}",
                hint="Use a causal language model with safetensors weights.",
                model=str(directory),
            ) from error
        return cls(model.to(device), quantize)

    def logits(self, ids: Tensor, keep: Tensor, slot: str | None) -> Tensor:
        """As `Network.logits`."""
        if self.gradient_checkpointing and not self._recomputes:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self._recomputes = True
        with self.using(slot):
            return self.model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]

    @contextmanager
    def using(self, slot: str | None) -> Iterator[None]:
        """Every token inside the block uses this adapter."""
        self._current[0] = slot
        try:
            yield
        finally:
            self._current[0] = None

    def loss(
        self,
        ids: Tensor,
        attention: Documents,
        labels: Tensor,
        at: Tensor,
        token_weights: Tensor,
        segments: Sequence[Segment] = (),
    ) -> tuple[Tensor, Tensor]:
        """As `Network.loss`, for a batch of exactly one document."""
        assert len(attention.lengths) == 1, "the plain path takes one document at a time"
        slot = segments[0].slot if segments else None
        losses = F.cross_entropy(self.logits(ids, at, slot).float(), labels, reduction="none")
        return (losses * token_weights).sum(), losses.detach()

    def linears(self) -> Iterator[FusedLinear]:
        return (module for module in self.modules() if isinstance(module, FusedLinear))

    def named_tensors(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by the names that transformers gave them."""
        return {name.removeprefix("model.").replace(".linear.", "."): value for name, value in parameters.items()}
