"""Base + adapter → full weights that plain transformers loads: W + scale · B · A, file by file."""

from __future__ import annotations

import json
import shutil
import uuid
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import AdapterError
from orchestrator.modeling.adapter_check import CONV1D_TYPES, check_adapter, embedding_name
from orchestrator.modeling.adapter_files import AdapterConfig, peft_name, read_adapter, split_name
from orchestrator.modeling.model_files import WANTED, read_config, tensor_shapes, weight_files

if TYPE_CHECKING:
    from torch import Tensor

_HEAD = "lm_head.weight"


def merge(base_dir: Path, adapter_dir: Path, out_dir: Path, dtype: str | None = None) -> Path:
    """Write the merged model to `out_dir`, which appears when it is complete; returns it.

    Memory: one of the base's weight files and the adapter.

    Args:
        dtype: `bfloat16` or `float32` for all weights; None keeps each as it is in the base.

    Raises:
        AdapterError: the adapter is damaged or does not fit this base, or `out_dir` holds something already.
        ModelError: the base cannot be read.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise AdapterError(
            f"{out_dir} exists and is not an empty directory.",
            hint="Name another --out, or remove it.",
            file=str(out_dir),
        )
    check_adapter(adapter_dir, base_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        partial.mkdir()
        _write(base_dir, adapter_dir, partial, dtype)
        partial.replace(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _write(base: Path, adapter: Path, out: Path, dtype: str | None) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = read_config(base, str(base))
    updates = _Updates(*read_adapter(adapter), turned=config.get("model_type") in CONV1D_TYPES)
    files = weight_files(base, str(base))
    holder = {name: file for file in files for name in tensor_shapes(file, str(base))}
    head = _untied_head(holder, updates, config)
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weight = opened.get_tensor(name)
                if name == head:
                    tensors[_HEAD] = _cast(updates.apply(_HEAD, weight), dtype)  # its own weights from now on
                if not (head and name == _HEAD):
                    tensors[name] = _cast(updates.apply(name, weight), dtype)
        if tensors:
            save_file({n: t.contiguous() for n, t in tensors.items()}, out / file.name, metadata={"format": "pt"})
            (out / file.name).chmod(0o644)  # safetensors makes it 0600
        del tensors
    if missed := updates.unused():
        raise AdapterError(f"The base {base} has no weights for {', '.join(missed[:3])}.", hint="Is it the right base?")
    if dtype:
        config["dtype"] = str(getattr(torch, dtype)).removeprefix("torch.")
        config.pop("torch_dtype", None)
    _copy_rest(base, out, config, holder, head)


class _Updates:
    """The adapter's updates by the base's weight names."""

    def __init__(self, config: AdapterConfig, tensors: dict[str, Tensor], *, turned: bool):
        self._config, self._turned = config, turned
        self._tensors = {peft_name(name): tensor for name, tensor in tensors.items()}
        self._left = {split[0] for name in tensors if (split := split_name(name))}

    def __contains__(self, weight: str) -> bool:
        return peft_name(weight.removesuffix("weight") + "lora_A.weight") in self._tensors

    def unused(self) -> list[str]:
        return sorted(self._left)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """W + scale · B · A, added in fp32 and rounded once; W itself when it is not adapted."""
        if name not in self:
            return weight
        module = name.removesuffix(".weight")
        self._left.discard(module)
        a = self._tensors[peft_name(f"{module}.lora_A.weight")].float()
        b = self._tensors[peft_name(f"{module}.lora_B.weight")].float()
        update = (b @ a) * self._config.scale_of(module)
        return (weight.float() + (update.t() if self._turned else update)).to(weight.dtype)


def _untied_head(holder: dict[str, Path], updates: _Updates, config: dict[str, Any]) -> str | None:
    """The embedding's name when the adapter changes an output head that is the embedding: the two must part."""
    tied = _HEAD not in holder or config.get("tie_word_embeddings") is True
    if _HEAD not in updates or not tied:
        return None
    name = embedding_name(dict.fromkeys(holder, ()))
    if name is None:
        raise AdapterError("The adapter changes lm_head, and the base has neither a head nor an embedding.")
    return name


def _cast(tensor: Tensor, dtype: str | None) -> Tensor:
    import torch

    return tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor


def _copy_rest(base: Path, out: Path, config: dict[str, Any], holder: dict[str, Path], head: str | None) -> None:
    """Tokenizer, templates, generation settings; `config.json` and the index as the merged weights need them."""
    for file in sorted(base.iterdir()):
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and not weights and any(fnmatch(file.name, pattern) for pattern in WANTED):
            shutil.copyfile(file, out / file.name)
    if head:
        config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(set(holder.values())) > 1:
        names = {name: file.name for name, file in holder.items()}
        if head:
            names[_HEAD] = holder[head].name
        total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
