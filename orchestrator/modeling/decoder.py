"""A decoder over flat tokens, `[tokens, hidden]`, with LoRA slots: one network for training, evaluation and serving.

There is no batch dimension and no padding: an `Attention` object knows which tokens belong together, and segments say
which adapter each token uses. q, k and v are one matmul, and so are gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchestrator.errors import ModelError
from orchestrator.modeling.architecture import Architecture
from orchestrator.modeling.attention import Attention, AttentionShape, Documents
from orchestrator.modeling.kernels import gated_activation, linear_cross_entropy, rms_norm, rotate
from orchestrator.modeling.lora import FusedLinear, LoraShape, MadeFrom, Projection, Segment


class Norm(nn.Module):
    """RMS norm over the last dimension."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float):
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


class Embedding(nn.Module):
    def __init__(self, weight: nn.Parameter, scale: float | None):
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, ids: Tensor) -> Tensor:
        out = nn.functional.embedding(ids, self.weight)
        # Gemma multiplies by its scale rounded to the weights' dtype: transformers#29402
        return out if self.scale is None else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)


class Head(nn.Module):
    """Logits, or losses without logits; its weight may be the embedding's."""

    def __init__(self, weight: nn.Parameter, softcap: float | None):
        super().__init__()
        self.weight, self.softcap = weight, softcap

    def forward(self, hidden: Tensor, labels: Tensor | None = None, token_weights: Tensor | None = None) -> Any:
        """Without labels: logits [tokens, vocab]. With: (weighted sum of losses, loss of each token)."""
        if labels is not None and token_weights is not None:
            return linear_cross_entropy(hidden, self.weight, labels, token_weights, self.softcap)
        logits = hidden @ self.weight.t()
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, index: int, architecture: Architecture, weights: LayerWeights):
        super().__init__()
        self.index, self.architecture = index, architecture
        self.attention_norm, self.mlp_norm = weights.attention_norm, weights.mlp_norm
        self.attention_post_norm, self.mlp_post_norm = weights.attention_post_norm, weights.mlp_post_norm
        self.q_norm, self.k_norm = weights.q_norm, weights.k_norm
        self.qkv, self.o, self.gate_up, self.down = weights.qkv, weights.o, weights.gate_up, weights.down
        a = architecture
        self.shape = AttentionShape(a.num_heads, a.num_kv_heads, a.head_dim, a.attention_scale, a.attention_softcap)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        segments: Sequence[Segment],
        kept: tuple[Tensor, Sequence[Segment]] | None = None,
        lean: bool = False,
    ) -> Tensor:
        """[tokens, hidden_size] → the same, or [kept, hidden_size].

        Args:
            kept: for these positions alone, with their segments, is done what follows attention.
            lean: as `Decoder.lean`.
        """
        a = self.architecture
        qkv = _through(self.qkv, self.attention_norm, x, segments, lean)
        if self.q_norm is not None and self.k_norm is not None:
            heads = qkv.view(len(x), -1, a.head_dim)
            q, k, v = heads.split([a.num_heads, a.num_kv_heads, a.num_kv_heads], 1)
            qkv = torch.cat([self.q_norm(q).flatten(1), self.k_norm(k).flatten(1), v.flatten(1)], 1)
        qkv = rotate(qkv, a.num_heads + a.num_kv_heads, cos, sin)
        context = attention(self.index, qkv.view(len(x), -1, a.head_dim), self.shape, a.windows[self.index])
        if kept is not None:
            keep, segments = kept
            x, context = x.index_select(0, keep), context.index_select(0, keep)
        attended = self.o(context, segments)
        x = x + (attended if self.attention_post_norm is None else self.attention_post_norm(attended))
        gate_up = _through(self.gate_up, self.mlp_norm, x, segments, lean)
        fed = _through(self.down, partial(gated_activation, activation=a.activation), gate_up, segments, lean)
        return x + (fed if self.mlp_post_norm is None else self.mlp_post_norm(fed))


def _through(
    linear: nn.Module, first: Callable[[Tensor], Tensor], x: Tensor, segments: Sequence[Segment], lean: bool
) -> Tensor:
    """linear(first(x)).

    Args:
        lean: keep x alone for the backward pass, which makes first(x) again.
    """
    return linear(first(x), segments, *([MadeFrom(x.detach(), first)] if lean else []))


@dataclass
class LayerWeights:
    attention_norm: Norm
    mlp_norm: Norm
    attention_post_norm: Norm | None
    mlp_post_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    qkv: nn.Module
    """This and the next three: `FusedLinear`, or what stands in its place where the network is served."""
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module


class Decoder(nn.Module):
    """Llama, Mistral, Qwen2, Qwen3, Gemma2 or Gemma3 text, with adapters in slots.

    Args:
        architecture: from `fused_architecture`.
        get: gives a tensor of the checkpoint by its Hugging Face name, in the dtype and on the device to use.
        quantize: turns a linear's [out, in] weight into a packed one; None keeps it plain.
    """

    packs = True
    """Takes several documents in one forward pass."""

    def __init__(
        self, architecture: Architecture, get: Callable[[str], Tensor], quantize: Callable[[Tensor], Any] | None = None
    ):
        super().__init__()
        self.architecture = a = architecture

        def parameter(name: str) -> nn.Parameter:
            return nn.Parameter(get(name), requires_grad=False)

        def norm(name: str) -> Norm:
            return Norm(parameter(f"{name}.weight"), a.norm_eps, a.norm_offset)

        def linear(prefix: str, names: dict[str, int], bias: bool) -> FusedLinear:
            projections, start = [], 0
            for name, size in names.items():
                projections.append(Projection(f"{prefix}.{name}", start, start + size))
                start += size
            weight = torch.cat([get(f"{p.name}.weight") for p in projections])
            biases = torch.cat([get(f"{p.name}.bias") for p in projections]) if bias else None
            return FusedLinear(
                quantize(weight) if quantize else nn.Parameter(weight, requires_grad=False),
                None if biases is None else nn.Parameter(biases, requires_grad=False),
                projections,
                dtype=weight.dtype,
            )

        def layer(i: int) -> Layer:
            prefix = f"model.layers.{i}"
            attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
            weights = LayerWeights(
                attention_norm=norm(f"{prefix}.input_layernorm"),
                mlp_norm=norm(f"{prefix}.{'pre_feedforward' if a.post_norms else 'post_attention'}_layernorm"),
                attention_post_norm=norm(f"{prefix}.post_attention_layernorm") if a.post_norms else None,
                mlp_post_norm=norm(f"{prefix}.post_feedforward_layernorm") if a.post_norms else None,
                q_norm=norm(f"{attn}.q_norm") if a.qk_norm else None,
                k_norm=norm(f"{attn}.k_norm") if a.qk_norm else None,
                qkv=linear(attn, {"q_proj": a.q_size, "k_proj": a.kv_size, "v_proj": a.kv_size}, a.qkv_bias),
                o=linear(attn, {"o_proj": a.hidden_size}, a.o_bias),
                gate_up=linear(mlp, {"gate_proj": a.intermediate_size, "up_proj": a.intermediate_size}, a.mlp_bias),
                down=linear(mlp, {"down_proj": a.hidden_size}, a.mlp_bias),
            )
            return Layer(i, a, weights)

        self.embedding = Embedding(parameter("model.embed_tokens.weight"), a.embedding_scale)
        self.layers = nn.ModuleList(layer(i) for i in range(a.num_layers))
        self.norm = norm("model.norm")
        self.head = Head(self.embedding.weight if a.tied else parameter("lm_head.weight"), a.logit_softcap)
        self.gradient_checkpointing = False
        self.lean = False
        """Compute the layers' norms and gates again in the backward pass: little work, and their results are not kept until then."""

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: Attention,
        segments: Sequence[Segment] = (),
        keep: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, normalised: ids and positions [tokens] → [tokens, hidden_size].

        Args:
            keep: [kept], ascending; only these positions are wanted, and the last layer computes no others.
        """
        x = self.embedding(ids)
        tables = [rope.table(positions) for rope in self.architecture.ropes]
        tables = [(cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)) for cos, sin in tables]
        # asked of a GPU before it has much to do: whoever asks waits until it is done
        kept = None if keep is None else (keep, kept_segments(segments, keep))
        for i, layer in enumerate(self.layers):
            cos, sin = tables[self.architecture.rope_of_layer[i]]
            wanted = kept if i == len(self.layers) - 1 else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attention, segments, wanted, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attention, segments, wanted, self.lean and torch.is_grad_enabled())
        return self.norm(x)

    def loss(
        self,
        ids: Tensor,
        attention: Documents,
        labels: Tensor,
        at: Tensor,
        token_weights: Tensor,
        segments: Sequence[Segment] = (),
    ) -> tuple[Tensor, Tensor]:
        """As `Network.loss`."""
        hidden = self(ids, attention.positions, attention, segments, at)
        return self.head(hidden, labels, token_weights)

    def logits(self, ids: Tensor, keep: Tensor, slot: str | None) -> Tensor:
        """As `Network.logits`."""
        document = Documents([len(ids)], ids.device)
        return self.head(self(ids, document.positions, document, [Segment(slot, 0, len(ids))], keep))

    def linears(self) -> Iterator[FusedLinear]:
        return (module for module in self.modules() if isinstance(module, FusedLinear))


def kept_segments(segments: Sequence[Segment], keep: Tensor) -> list[Segment]:
    """The same adapters over the kept tokens, `keep` being ascending positions."""
    borders = torch.tensor([border for s in segments for border in (s.start, s.stop)], device=keep.device)
    places = torch.searchsorted(keep, borders.to(keep.dtype)).tolist()
    return [Segment(s.slot, places[2 * n], places[2 * n + 1], s.seed) for n, s in enumerate(segments)]


def projection_names(model: nn.Module) -> list[str]:
    """Full names of the linears that an adapter can target."""
    return [p.name for m in model.modules() if isinstance(m, FusedLinear) for p in m.projections]


def add_adapter(model: nn.Module, slot: str, shape: LoraShape, seed: int) -> None:
    """Put a fresh adapter into a slot of every linear that it targets.

    Raises:
        ModelError: a target names no module (the message lists what does), or the rank exceeds a layer's width.
    """
    names = projection_names(model)
    for target in sorted(shape.targets or ()):
        if not any(LoraShape(1, 1, targets=frozenset({target})).covers(name) for name in names):
            short = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ModelError(
                f"tuning.targets: {target!r} matches no linear module of this model.",
                hint=f"These do: {', '.join(short)}; or write all-linear.",
                target=target,
            )
    generator = torch.Generator().manual_seed(seed)
    for linear in (m for m in model.modules() if isinstance(m, FusedLinear)):
        for p in linear.projections:
            width = min(p.stop - p.start, linear.in_features)
            if shape.covers(p.name) and shape.rank > width:
                raise ModelError(
                    f"tuning.rank: {shape.rank} is above the width of {p.name} ({width}).",
                    hint=f"Use a rank of at most {width}, or leave that module out of tuning.targets.",
                    rank=shape.rank,
                )
        linear.add(slot, shape, generator)


def remove_adapter(model: nn.Module, slot: str) -> None:
    """Empty a slot; one that is empty stays so."""
    for linear in (m for m in model.modules() if isinstance(m, FusedLinear)):
        linear.remove(slot)


def adapter_parameters(model: nn.Module, slot: str) -> dict[str, nn.Parameter]:
    """The slot's stacked A and B Parameters, by a name of their own."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear) and slot in module.slots:
            out[f"{name}.lora_a"], out[f"{name}.lora_b"] = module.parameters_of(slot)
    return out


def adapter_tensors(model: nn.Module, slot: str, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The slot's update by PEFT's names: `base_model.model.….q_proj.lora_A.weight` [rank, in], `lora_B` [out, rank].

    Args:
        values: use these instead of the Parameters (fp32 masters, say), keyed as `adapter_parameters`.
    """
    out: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear) and (lora := module.slots.get(slot)):
            a, b = (
                module.parameters_of(slot) if values is None else (values[f"{name}.lora_a"], values[f"{name}.lora_b"])
            )
            out |= {f"base_model.model.{key}": part for key, part in lora.split(a.detach(), b.detach()).items()}
    return out
