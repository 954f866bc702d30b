"""Trained weights as files: written, loaded back into a network, and compared with the model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from orchestrator.errors import AdapterError
from orchestrator.modeling.adapter_files import AdapterConfig, read_adapter, write_adapter
from orchestrator.modeling.decoder import adapter_parameters, add_adapter
from orchestrator.modeling.lora import FusedLinear, LoraShape
from orchestrator.spec.job import LoraTuning

PUBLISHED = "published"
"""Slot into which the adapter is loaded back from its files; what is evaluated is what was published."""


def lora_shape(tuning: LoraTuning) -> LoraShape:
    targets = None if tuning.targets == "all-linear" else frozenset(tuning.targets)
    return LoraShape(tuning.rank, tuning.alpha, tuning.dropout, tuning.rslora, targets)


def write_trained_adapter(directory: Path, tuning: LoraTuning, base_name: str, tensors: dict[str, Tensor]) -> None:
    """PEFT's two files. Targets are written by their short names, which is what every loader matches."""
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    config = AdapterConfig(
        rank=tuning.rank,
        alpha=tuning.alpha,
        dropout=tuning.dropout,
        rslora=tuning.rslora,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        base_model=base_name,
    )
    write_adapter(directory, config, tensors)


def load_adapter(model: nn.Module, slot: str, directory: Path) -> None:
    """Put an adapter's files into a slot.

    Raises:
        AdapterError: a tensor is missing, or one is left over that matches no module.
    """
    config, tensors = read_adapter(directory)
    targets = None if isinstance(config.target_modules, str) else frozenset(config.target_modules)
    add_adapter(model, slot, LoraShape(config.rank, config.alpha, 0.0, config.rslora, targets), seed=0)
    left = dict(tensors)
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, FusedLinear) and slot in m.slots):
            for name, part in linear.slots[slot].split(*linear.parameters_of(slot)).items():
                key = f"base_model.model.{name}"
                if key not in left:
                    raise AdapterError(f"The adapter in {directory} lacks {key}.", check="coverage")
                part.copy_(left.pop(key))
    if left:
        raise AdapterError(
            f"{len(left)} tensors of the adapter in {directory} match no module of the base, {min(left)} first.",
            check="coverage",
        )
    for parameter in adapter_parameters(model, slot).values():
        parameter.requires_grad_(False)


def write_full_weights(directory: Path, base: Path, tensors: dict[str, Tensor]) -> None:
    """A directory that plain transformers loads: the base's config and tokenizer with new weights."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and "safetensors" not in file.name:
            shutil.copyfile(file, directory / file.name)
    # a fused matrix was split into views, and safetensors refuses tensors that share memory
    save_torch_state_dict(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, directory
    )


@torch.no_grad()
def check_same(
    trained: Tensor, published: Callable[[], Tensor], base: Callable[[], Tensor], *, tolerance: float
) -> dict[str, float]:
    """Compare logits on a probe: trained against loaded back, and both against the base.

    Args:
        trained: [tokens, vocab], of the model in memory.
        tolerance: largest difference allowed between `trained` and `published`, relative to the largest logit.

    Raises:
        AdapterError: not finite, not what was trained, or without effect on the base.
    """
    again = published()
    effect = check_effect(again, base())
    scale = trained.abs().max().item()
    error = (trained - again).abs().max().item()
    if error > tolerance * scale:
        raise AdapterError(
            f"Loaded back from its files, the adapter differs from the trained model by {error:.3g} "
            f"(logits up to {scale:.3g}); nothing is published.",
            hint="This is a defect of Adaptory: please report it with the run's log.",
            check="same",
        )
    return {"probe_error": error} | effect


def check_effect(published: Tensor, base: Tensor) -> dict[str, float]:
    """Compare logits on a probe, [tokens, vocab] each.

    Raises:
        AdapterError: not finite, or without effect on the base.
    """
    if not torch.isfinite(published).all():
        raise AdapterError(
            "The trained weights give logits that are not finite; nothing is published.",
            hint="Resume from an earlier checkpoint with a lower learning rate.",
            check="finite",
        )
    effect = (published - base).abs().max().item()
    if effect == 0.0:
        raise AdapterError(
            "The trained weights change nothing: on a probe the logits are the base model's, so nothing is published.",
            hint="Raise train.learning_rate or train.epochs, and look at the loss curve with `adaptory runs plot`.",
            check="effect",
        )
    return {"probe_effect": effect}
