"""A decoder as it is served: the network of `orchestrator.modeling` with other linears in it, and adapters by digest."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from orchestrator.modeling.adapter_files import read_adapter
from orchestrator.modeling.decoder import Decoder, Layer, LayerWeights
from orchestrator.modeling.lora import FusedLinear, Segment
from serving.engine.attention import KeyValueCache, Span, StepAttention
from serving.engine.fused import FusedAttention, FusedNetwork
from serving.engine.kernels import kernels
from serving.engine.linears import Mixture, ServedLinear, packed, packed_linear
from serving.engine.prepared import Adapter, Place, Places, prepare


class ServedNetwork:
    """Shares the decoder's weights, or has packed copies of them; the decoder itself is left as it was.

    Args:
        model: in evaluation mode.
        pack: whether to pack weights; None: where a CPU has the memory for a second copy of them.
        fuse: whether to use the kernels of `serving.engine.fused` where there are any.
    """

    def __init__(self, model: Decoder, pack: bool | None = None, *, fuse: bool = True):
        self.architecture = model.architecture
        self.device, self.dtype = model.norm.weight.device, model.norm.weight.dtype
        if pack is None:
            pack = self.device.type == "cpu" and _bytes(model) < psutil.virtual_memory().available // 2
        self._decoder = copy.copy(model)
        self._decoder._modules = dict(model._modules)
        self._decoder.layers = nn.ModuleList(_served(layer, pack) for layer in model.layers)
        self._decoder.eval()
        self._head = packed(model.head.weight.detach()) if pack else None
        self._linears = {n: m for n, m in self._decoder.named_modules() if isinstance(m, ServedLinear)}
        self.places: Places = {
            p.name: Place(name, number, p.stop - p.start, linear.in_features)
            for name, linear in self._linears.items()
            for number, p in enumerate(linear.projections)
        }
        self._ranks: dict[str, int] = {}
        found = kernels(self.dtype, self.device) if fuse else None
        self._fused = FusedNetwork(found, self._decoder, self._linears) if found else None

    def attention(self, cache: KeyValueCache, spans: Sequence[Span]) -> StepAttention:
        """
        Args:
            spans: the step's sequences, those with a single new token first.
        """
        a = self.architecture
        heads = a.num_kv_heads, a.num_heads // a.num_kv_heads
        if self._fused is None:
            return StepAttention(cache, spans, *heads)
        return FusedAttention(self._fused.kernels, cache, spans, *heads)

    def hidden(self, ids: Tensor, attention: StepAttention, segments: Sequence[Segment], keep: Tensor | None) -> Tensor:
        """As `Decoder.forward`: [tokens] → [kept, hidden_size]."""
        if self._fused is not None and isinstance(attention, FusedAttention):
            return self._fused.hidden(ids, attention, segments, keep)
        mixture = Mixture(segments, self._ranks, self.device)
        return self._decoder(ids, attention.positions, attention, mixture, keep)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size] → [tokens, vocab], fp32."""
        if self._head is None:
            return self._decoder.head(hidden).float()
        logits, softcap = packed_linear(hidden, self._head, None).float(), self.architecture.logit_softcap
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    def cache_tokens(self, share: float) -> int:
        """Tokens of a key-value cache that takes this share of the memory that is free now."""
        free = psutil.virtual_memory().available
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
        a = self.architecture
        return int(share * free) // (2 * a.num_layers * a.kv_size * self.dtype.itemsize)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._ranks)

    def read(self, directory: Path) -> Adapter:
        """An adapter's files, ready for `install`. Touches nothing that a step uses: any thread may call it.

        Raises:
            AdapterError: damaged, it does not fit this base, or a weight is not finite.
        """
        config, tensors = read_adapter(directory)
        return prepare(config, tensors, self.places, self.dtype, str(directory)).updates(self.device)

    def install(self, digest: str, adapter: Adapter) -> None:
        """Between two steps."""
        for name, updates in adapter.items():
            self._linears[name].load(digest, updates)
        if self._fused is not None:
            self._fused.install(digest, adapter)
        self._ranks[digest] = max(len(update.a) for updates in adapter.values() for update in updates)

    def remove(self, digest: str) -> None:
        """Between two steps."""
        for linear in self._linears.values():
            linear.unload(digest)
        if self._fused is not None and digest in self._ranks:
            self._fused.remove(digest)
        self._ranks.pop(digest, None)


def _served(layer: nn.Module, pack: bool) -> Layer:
    """The same layer, its linears excepted."""
    assert isinstance(layer, Layer)
    weights: dict[str, Any] = {name: getattr(layer, name) for name in LayerWeights.__dataclass_fields__}
    linears = {name: ServedLinear(m, pack) for name, m in weights.items() if isinstance(m, FusedLinear)}
    return Layer(layer.index, layer.architecture, LayerWeights(**weights | linears))


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
