"""What distinguishes the decoders that the fused path runs: read from a Hugging Face config, nothing else.

Llama, Mistral, Qwen2, Qwen3, Gemma2 and Gemma3 (text) are one network with a few switches. Any other decoder runs by
the plain path (`orchestrator.modeling.plain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the length


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer."""

    inverse_frequencies: torch.Tensor
    """[head_dim / 2], fp32."""
    scaling: float
    """Factor on cos and sin (yarn)."""

    def table(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position: two [tokens, head_dim / 2], fp32."""
        angles = positions[:, None].float() * self.inverse_frequencies.to(positions.device)
        return angles.cos() * self.scaling, angles.sin() * self.scaling


@dataclass(frozen=True)
class Architecture:
    """A decoder's shape and switches."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    norm_offset: float
    """Added to a norm's weight: 1 in Gemma."""
    post_norms: bool
    """Gemma also normalises what attention and MLP give back."""
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: str
    """`silu` or `gelu_tanh`, of the gate."""
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float | None
    tied: bool
    """The output head is the embedding."""
    windows: tuple[int | None, ...]
    """Per layer: a query sees the last `window` positions, itself included; None: all."""
    rope_of_layer: tuple[int, ...]
    ropes: tuple[Rope, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def fused_architecture(config: Any) -> Architecture | None:
    """The architecture of a transformers config, or None when only the plain path can run it."""
    kind = config.model_type
    ropes = _ropes(config) if kind in _FUSED else None
    activation = _activation(config)
    if ropes is None or activation is None or getattr(config, "use_bidirectional_attention", False):
        return None
    gemma = kind.startswith("gemma")
    layers = config.num_hidden_layers
    layer_types = _layer_types(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bias = bool(getattr(config, "attention_bias", False))
    kinds = sorted(ropes)
    return Architecture(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        qk_norm=kind in ("qwen3", "gemma3_text"),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        activation=activation,
        attention_scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        attention_softcap=getattr(config, "attn_logit_softcapping", None) if kind == "gemma2" else None,
        logit_softcap=getattr(config, "final_logit_softcapping", None) if gemma else None,
        embedding_scale=config.hidden_size**0.5 if gemma else None,
        tied=bool(config.tie_word_embeddings),
        windows=tuple(config.sliding_window if t == "sliding_attention" else None for t in layer_types),
        rope_of_layer=tuple(kinds.index(t if t in ropes else kinds[0]) for t in layer_types),
        ropes=tuple(ropes[k] for k in kinds),
    )


def _layer_types(config: Any) -> list[str]:
    if types := getattr(config, "layer_types", None):
        return list(types)
    # Mistral has one window for all layers and no list of types.
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * (
        config.num_hidden_layers
    )


def _activation(config: Any) -> str | None:
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}.get(str(name))


def _ropes(config: Any) -> dict[str, Rope] | None:
    """Per layer type (or one `default`), by transformers' own formulas; None for a kind that depends on the length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    per_type = config.rope_parameters
    if "rope_type" in per_type:
        per_type = {"default": per_type}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    out = {}
    for layer_type, parameters in per_type.items():
        kind = parameters["rope_type"]
        if kind not in _STATIC_ROPE or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            return None
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
            frequencies, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        else:
            keywords = {} if layer_type == "default" else {"layer_type": layer_type}
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **keywords)
        out[layer_type] = Rope(frequencies, scaling)
    return out
