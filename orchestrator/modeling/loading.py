"""From a base model's directory to a network that trains: the fused decoder where it can, the plain path elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from orchestrator.errors import ModelError
from orchestrator.modeling import light_transformers
from orchestrator.modeling.architecture import fused_architecture
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.lora import FusedLinear
from orchestrator.modeling.plain import PlainDecoder


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantize: Callable[[Tensor], Any] | None = None,
    plain: bool = False,
    building: AbstractContextManager[Any] | None = None,
) -> Decoder | PlainDecoder:
    """A frozen decoder from `config.json` and safetensors.

    Args:
        directory: a materialised base model.
        quantize: packs each linear's weight (see `orchestrator.modeling.quantization`).
        plain: take the plain path even where the fused one could run.
        building: entered while a fused decoder is made (ZeRO-3 partitions each weight as it is read). The plain path reads
            all weights first, as transformers does, and leaves it to the engine to partition them.

    Raises:
        ModelError: no decoder, or weights that are missing or do not fit the config.
    """
    light_transformers.prepare()
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    architecture = None if plain else fused_architecture(config)
    if architecture is None:
        return PlainDecoder.load(directory, dtype=dtype, device=device, quantize=quantize)
    with open_weights(directory) as read, building or nullcontext():
        try:
            return Decoder(architecture, lambda name: read(name).to(device=device, dtype=dtype), quantize)
        except RuntimeError as error:
            if "memory" in str(error).lower():  # too little of it, on the GPU or here: not the weights' fault
                raise
            raise ModelError(
                f"The weights in {directory} do not fit its config.json: {error}",
                hint="Fetch the model again; config and weights must belong together.",
                model=str(directory),
            ) from error


@contextmanager
def open_weights(directory: Path) -> Iterator[Callable[[str], Tensor]]:
    """A reader of single tensors by name over one or many safetensors files, memory-mapped."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        places = {}
        for name in files:
            with safe_open(directory / name, framework="pt") as shard:
                places |= dict.fromkeys(shard.keys(), name)
    shards: dict[str, Any] = {}

    def read(name: str) -> Tensor:
        if name not in places:
            raise ModelError(
                f"The base model in {directory} has no tensor {name!r}.",
                hint="Its weights are incomplete, or of another architecture than config.json says.",
                model=str(directory),
            )
        file = places[name]
        if file not in shards:
            shards[file] = safe_open(directory / file, framework="pt")
        return shards[file].get_tensor(name)

    yield read


def train_everything(model: nn.Module) -> None:
    """Full tuning: every weight gets a gradient."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def full_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every Parameter once, by the module's own name (a tied head is the embedding)."""
    return dict(model.named_parameters())


def full_tensors(model: Decoder | PlainDecoder, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every weight by its Hugging Face name, fused matrices split again.

    Args:
        values: use these instead of the Parameters (fp32 masters, say), keyed as `full_parameters`.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()} if values is None else values
    if isinstance(model, PlainDecoder):
        return model.named_tensors(parameters)
    out: dict[str, Tensor] = {}
    for name, value in parameters.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, FusedLinear):
            kind = name.rpartition(".")[2]
            out |= {f"{p.name}.{kind}": value[p.start : p.stop] for p in module.projections}
        else:
            out[_huggingface_name(name, model)] = value
    return out


def _huggingface_name(name: str, model: Decoder) -> str:
    post = "post_attention" if not model.architecture.post_norms else "pre_feedforward"
    fixed = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    inner = {
        "attention_norm": "input_layernorm",
        "mlp_norm": f"{post}_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
    }
    if name in fixed:
        return fixed[name]
    _, index, norm, _ = name.split(".")
    return f"model.layers.{index}.{inner[norm]}.weight"
