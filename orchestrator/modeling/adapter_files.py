"""Adapter directories in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, so they load anywhere.

Everything except `write_adapter` and `read_adapter` works on headers and raw bytes, without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, deserialize

from orchestrator.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# What PEFT can write and no plain A, B pair expresses: it would be dropped silently.
_FOREIGN = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    "velora_config",
)
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says, as far as it matters to a plain LoRA adapter."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    """Module names, matched by their last parts as PEFT does; a string is PEFT's regular expression."""
    dropout: float = 0.0
    rslora: bool = False
    base_model: str | None = None
    """PEFT's `base_model_name_or_path`: something that `from_pretrained` takes."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another rank for modules whose name ends with this (a regular expression)."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    """The base keeps its weights as [in, out] (GPT-2)."""

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Factor on B·A: alpha/rank, or alpha/sqrt(rank) (arXiv:2312.03732)."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)

    def to_peft(self) -> dict[str, Any]:
        """The keys that any PEFT, vLLM and LoRAX reads; newer PEFT fills in the rest as it writes it."""
        targets = self.target_modules if isinstance(self.target_modules, str) else sorted(self.target_modules)
        return {
            "alpha_pattern": {name: _number(value) for name, value in self.alpha_pattern.items()},
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": _number(self.alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": dict(self.rank_pattern),
            "revision": None,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": self.rslora,
        }

    def canonical(self) -> dict[str, Any]:
        """What decides how the tensors are applied; part of the digest."""
        kept = ("alpha_pattern", "lora_alpha", "r", "rank_pattern", "target_modules", "use_rslora")
        return {key: value for key, value in self.to_peft().items() if key in kept}


@dataclass(frozen=True)
class RawTensor:
    dtype: str
    """safetensors' name: `F32`, `BF16`, …"""
    shape: tuple[int, ...]
    data: bytearray
    """Little-endian, row by row."""


def split_name(name: str) -> tuple[str, str] | None:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → (`model.layers.0.self_attn.q_proj`, `A`)."""
    match = _NAME.fullmatch(name)
    return (match["module"], match["side"]) if match else None


def peft_name(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name


def write_adapter(directory: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files, `directory` being made if need be.

    Args:
        tensors: by PEFT's name, with or without its `base_model.model.`: `….lora_A.weight` [rank, in] and
            `….lora_B.weight` [out, rank].

    Raises:
        AdapterError: no tensors, a name that is no LoRA tensor, or one that is empty or not gathered (a ZeRO-3 shard:
            trl#4416, peft#2892).
    """
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if split_name(name) is None:
            raise AdapterError(f"{name!r} is no LoRA tensor.", hint="Expected ….lora_A.weight or ….lora_B.weight.")
        if tensor.dim() != 2 or tensor.numel() == 0:
            raise AdapterError(
                f"{name} has shape {list(tensor.shape)}: it is one worker's part, or empty.",
                hint="Gather the weights of all workers before writing the adapter.",
                check="shape",
            )
    if not tensors:
        raise AdapterError("There are no LoRA tensors to write.", hint="Check tuning.targets.", check="shape")
    directory.mkdir(parents=True, exist_ok=True)
    # A clone, because safetensors refuses views that share memory (q, k and v are rows of one stacked matrix).
    plain = {peft_name(name): tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(config.to_peft(), indent=2) + "\n")


def read_adapter(directory: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and tensors, by PEFT's full names, on the CPU in the dtype they are stored in.

    Raises:
        AdapterError: missing, damaged, a pickle, or more than plain LoRA.
    """
    from safetensors.torch import load_file

    config = read_adapter_config(directory)
    file = _weights_file(directory)
    try:
        return config, load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def read_adapter_config(directory: Path) -> AdapterConfig:
    """
    Raises:
        AdapterError: missing, damaged, or not plain LoRA (DoRA, trained biases, a changed base, …).
    """
    file = directory / CONFIG_FILE
    try:
        written = json.loads(file.read_bytes())
        if not isinstance(written, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise AdapterError(
            f"{directory} is no adapter: {CONFIG_FILE} cannot be read ({error.strerror}).",
            hint="Name the directory that PEFT's save_pretrained wrote.",
            adapter=str(directory),
            check="config",
        ) from error
    except ValueError as error:
        raise AdapterError(
            f"{file} is not JSON: {error}.", hint="Copy the adapter again.", adapter=str(directory), check="config"
        ) from error
    _refuse_foreign(written, file)
    try:
        targets = written["target_modules"]
        return AdapterConfig(
            rank=int(written["r"]),
            alpha=float(written["lora_alpha"]),
            target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
            dropout=float(written.get("lora_dropout") or 0.0),
            rslora=bool(written.get("use_rslora")),
            base_model=written.get("base_model_name_or_path"),
            rank_pattern=dict(written.get("rank_pattern") or {}),
            alpha_pattern=dict(written.get("alpha_pattern") or {}),
            fan_in_fan_out=bool(written.get("fan_in_fan_out")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{file} lacks or misstates {error}.", hint="It needs r, lora_alpha and target_modules.", check="config"
        ) from error


def _refuse_foreign(written: dict[str, Any], file: Path) -> None:
    kind = written.get("peft_type")
    foreign = [key for key in _FOREIGN if written.get(key)]
    if written.get("bias", "none") != "none":
        foreign.append("bias")
    start = str(written.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_THE_BASE):
        foreign.append(f"init_lora_weights={start}")
    if kind != "LORA" or foreign:
        what = f"uses {', '.join(foreign)}" if kind == "LORA" else f"is {kind}, not LORA"
        raise AdapterError(
            f"The adapter {file} {what}: more than a plain LoRA update.",
            hint="Merge it into its base with PEFT, or train it as plain LoRA or rsLoRA.",
            adapter=str(file.parent),
            check="config",
        )


def raw_tensors(directory: Path) -> dict[str, RawTensor]:
    """Tensors by name as stored, sorted, without torch.

    Raises:
        AdapterError: missing, damaged, or a pickle.
    """
    file = _weights_file(directory)
    try:
        found = deserialize(file.read_bytes())
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    return {name: RawTensor(t["dtype"], tuple(t["shape"]), t["data"]) for name, t in sorted(found)}


def adapter_digest(directory: Path, base_digest: str) -> str:
    """`sha256:…` over weights, LoRA configuration and base: equal weights have one name, whatever the file's layout.

    Raises:
        AdapterError: as `read_adapter`.
    """
    return content_digest(read_adapter_config(directory), raw_tensors(directory), base_digest)


def content_digest(config: AdapterConfig, tensors: Mapping[str, RawTensor], base_digest: str) -> str:
    """As `adapter_digest`, of what is read already.

    Args:
        tensors: sorted by name.
    """
    canonical = {
        "base": base_digest,
        "lora": config.canonical(),
        "tensors": [
            [peft_name(name), t.dtype, list(t.shape), hashlib.sha256(t.data).hexdigest()] for name, t in tensors.items()
        ],
    }
    return "sha256:" + hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS_FILE
    if file.is_file():
        return file
    pickle = directory / "adapter_model.bin"
    if pickle.is_file():
        raise AdapterError(
            f"{pickle} is a pickle, which can run code when loaded.",
            hint="Save it as safetensors with PEFT on a machine that may trust it.",
            adapter=str(directory),
            check="weights",
        )
    held = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) if directory.is_dir() else "no such directory"
    raise AdapterError(
        f"{directory} has no {WEIGHTS_FILE} (it holds: {held}).",
        hint="Name the directory that PEFT's save_pretrained wrote.",
        adapter=str(directory),
        check="weights",
    )


def _damaged(file: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{file} is damaged: {error}.", hint="Copy it again.", adapter=str(file.parent), check="weights"
    )


def _by_pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    """As PEFT's `get_pattern_key`: the first pattern that the end of the module's name matches."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
