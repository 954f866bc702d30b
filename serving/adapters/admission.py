"""What an adapter must be before the engine sees it. Whoever wrote it is not trusted, nor is the store's manifest.

Every refusal is an `AdapterError` whose `check` is one of `CHECKS`. All checks see the same bytes, read once, and what is
installed is made of those bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import AdapterError, StoreError
from orchestrator.modeling.adapter_check import content_problems, refuse
from orchestrator.modeling.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    RawTensor,
    content_digest,
    peft_name,
    raw_tensors,
    read_adapter_config,
)
from orchestrator.store import MANIFEST, Manifest, Store, adapter_path
from serving.engine.prepared import Places, Prepared, prepare

CHECKS = {
    "digest": "it is named by a digest, and the content has that digest",
    "published": "the store has it, complete",
    "kind": "a LoRA adapter, not whole weights",
    "contained": "file names and links stay inside its directory",
    "size": "small enough for this engine",
    "bytes": "every file is what the manifest says",
    "weights": "safetensors that can be read, no pickle",
    "signature": "signed by somebody who may",
    "config": "plain LoRA, with patterns that cannot stall the loader",
    "base": "trained on the base that is served",
    "rank": "within the engine's limit",
    "names": "each tensor has its module in the base, each module that it claims has its tensors",
    "shape": "matrices that fit",
    "finite": "no NaN, no infinity, in the engine's dtype too",
    "effect": "it changes what the base says",
}
"""Values of `check`, and what holds when it passes."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".py"})
_CONFIG_BYTES = 1 << 20
_PATTERNS = 256  # each is tried on each module, and `re` keeps no more than 512 compiled
_TARGETS = 4096
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Signature = Callable[[Path, str], object]
"""(directory, digest); raises AdapterError with check `signature`. It runs in the loader's process, so it must pickle, as
`Trust.verify` of given keys does."""


@dataclass(frozen=True)
class Requirements:
    """What one engine can serve."""

    base_digest: str
    places: Places
    """Of its network: the linears that an adapter may target."""
    dtype: torch.dtype
    """Of its network."""
    max_rank: int = 128
    max_bytes: int = 2 << 30
    """Of all files of an adapter."""
    signature: Signature | None = None
    """None: unsigned adapters are served."""


def check_digest(digest: str) -> None:
    """
    Raises:
        AdapterError: not `sha256:` and 64 hex digits; nothing else ever becomes part of a path.
    """
    if not _DIGEST.fullmatch(digest):
        raise refused("digest", digest[:100], "is named by something else than a digest", "Name it by its digest.")


# --- before it is fetched -------------------------------------------------------------------------------------------


def published(store: Store, digest: str, requirements: Requirements) -> Manifest:
    """Refuse what can be refused without fetching it: the manifest's word is enough to refuse, never to admit.

    Raises:
        AdapterError: of the checks `published`, `kind`, `contained`, `weights`, `size`, `base`, `rank`.
        StoreError: the store cannot be read.
    """
    path = adapter_path(digest)
    if store.local:
        _check_link(Path(store.full(path)), Path(store.root), digest)
    manifest = store.manifest(path)
    if manifest is None and store.local and not Path(store.root).is_dir():
        raise StoreError(
            f"The store {store.url} is not there.", hint="Mount it again, or restore it.", url=store.url, path=path
        )
    if manifest is None:
        raise refused("published", digest, "is not in the store", "`adaptory adapters list` shows all.")
    for name in manifest.files:
        check_name(name, digest)
        if store.local:
            _check_link(Path(store.full(f"{path}/{name}")), Path(store.full(path)), digest)
    said = manifest.metadata
    if said.get("kind", "lora") != "lora":
        raise refused("kind", digest, "is whole weights, not a LoRA adapter", "Serve it as a base model.")
    check_files(set(manifest.files), digest)
    size = sum(entry.size for entry in manifest.files.values())
    if size > requirements.max_bytes:
        raise refused("size", digest, f"has {size:,} bytes; the limit is {requirements.max_bytes:,}", _SMALLER)
    _check_base(said.get("base_digest", requirements.base_digest), requirements, digest)
    _check_rank(said.get("rank"), requirements, digest)
    return manifest


def check_name(name: str, digest: str) -> None:
    """
    Raises:
        AdapterError: the name of a file that could lie outside of the adapter's directory, or hide in it.
    """
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and all(part.isprintable() and not part.startswith(".") for part in parts)
    if not plain or name.startswith("/") or "\\" in name or not parts or len(name) > 255:
        raise refused("contained", digest, f"has a file named {name[:100]!r}", "Publish it again from plain files.")


def check_files(names: set[str], digest: str) -> None:
    """
    Raises:
        AdapterError: no safetensors, or something that runs code when it is loaded.
    """
    if pickles := sorted(n for n in names if PurePosixPath(n).suffix.lower() in _PICKLES):
        raise refused("weights", digest, f"holds {pickles[0]}, which can run code when loaded", _SAFETENSORS)
    if missing := {CONFIG_FILE, WEIGHTS_FILE} - names:
        raise refused("weights", digest, f"has no {min(missing)}", _SAFETENSORS)


def _check_link(path: Path, within: Path, digest: str) -> None:
    if not path.resolve().is_relative_to(within.resolve()):
        raise refused("contained", digest, f"has a link out of it ({path.name})", "Publish it again from plain files.")


# --- what was fetched -----------------------------------------------------------------------------------------------


def admit(directory: Path, digest: str, requirements: Requirements) -> Prepared:
    """All checks of an adapter's files; returns it ready for the engine.

    Args:
        directory: holds nothing but this adapter, and nobody else writes there.

    Raises:
        AdapterError: with the `check` that failed.
    """
    check_digest(digest)
    files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()}
    for name, path in files.items():
        check_name(name, digest)
        _check_link(path, directory, digest)
    check_files(set(files) - {MANIFEST}, digest)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if sum(sizes.values()) > requirements.max_bytes:
        raise refused("size", digest, f"has {sum(sizes.values()):,} bytes", _SMALLER)
    if requirements.signature is not None:
        requirements.signature(directory, digest)
    try:
        config, tensors = _config(directory, digest, sizes[CONFIG_FILE]), raw_tensors(directory)
        _check_content(config, tensors, directory, digest, requirements)
        _check_ranks(config, tensors, requirements, digest)
        linears = {name: (place.out_features, place.in_features) for name, place in requirements.places.items()}
        refuse(content_problems(config, tensors, linears), digest)
        plain = {name: _tensor(tensor) for name, tensor in tensors.items()}
        return prepare(config, plain, requirements.places, requirements.dtype, digest)
    except AdapterError as error:  # readers name the directory, which is this node's own affair
        message = error.message.replace(str(directory), digest)
        check = error.context.get("check", "config")
        raise AdapterError(message, hint=error.hint, adapter=digest, check=check) from error
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:  # a rank of "x", a deep nesting
        raise refused("config", digest, f"has an {CONFIG_FILE} that makes no sense ({error})", _PLAIN) from error


def _config(directory: Path, digest: str, size: int) -> AdapterConfig:
    if size > _CONFIG_BYTES:
        raise refused("config", digest, f"has an {CONFIG_FILE} of {size:,} bytes", _PLAIN)
    config = read_adapter_config(directory)
    patterns, targets = [*config.rank_pattern, *config.alpha_pattern], config.target_modules
    if len(patterns) > _PATTERNS or len(targets) > _TARGETS:
        raise refused("config", digest, f"has {len(patterns)} patterns and {len(targets)} targets", _PLAIN)
    if hard := next((p for p in [*patterns, targets] if isinstance(p, str) and not _easy(p)), None):
        raise refused("config", digest, f"has the pattern {hard[:100]!r}, which may take forever to match", _PLAIN)
    return config


def _easy(pattern: str) -> bool:
    """Whether a regular expression is matched in a moment, whatever the text: few choices, and none of them repeated.

    Backtracking doubles with each repeated choice (`(a+)+`), and multiplies by the text's length with each repetition.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    repeated_group = re.search(r"\)\s*[*+?{]", pattern)
    foreign_group = re.search(r"\(\?(?!:)", pattern)
    choices = len(re.findall(r"[*+?{(]", pattern.replace("(?:", "(")))
    return (
        len(pattern) <= 4000 and not repeated_group and not foreign_group and choices <= 3 and pattern.count("|") <= 64
    )


def _check_content(
    config: AdapterConfig, tensors: dict[str, RawTensor], directory: Path, digest: str, requirements: Requirements
) -> None:
    if content_digest(config, tensors, requirements.base_digest) == digest:
        return
    said = _said_base(directory)  # another base explains another digest, if it is the whole difference
    if said is not None and content_digest(config, tensors, said) == digest:
        _check_base(said, requirements, digest)
    raise refused(
        "digest", digest, "has another content than its digest says", "Do not use it; publish it again from its source."
    )


def _said_base(directory: Path) -> str | None:
    from orchestrator.registry.provenance import PROVENANCE_FILE, Provenance

    try:
        return Provenance.model_validate_json((directory / PROVENANCE_FILE).read_bytes()).base_model.digest
    except (OSError, ValueError):
        return None


def _check_base(said: Any, requirements: Requirements, digest: str) -> None:
    if said != requirements.base_digest:
        what = f"was trained on {str(said)[:80]}; this engine serves {requirements.base_digest}"
        raise refused("base", digest, what, "Route it to an engine of its own base.")


def _check_ranks(config: AdapterConfig, tensors: dict[str, RawTensor], requirements: Requirements, digest: str) -> None:
    if len({peft_name(name) for name in tensors}) < len(tensors):
        raise refused("names", digest, "has a tensor twice, with and without PEFT's prefix", _PLAIN)
    for rank in (config.rank, *config.rank_pattern.values()):
        _check_rank(rank, requirements, digest)
    for name, tensor in tensors.items():
        _check_rank(min(tensor.shape, default=0) if "lora_" in name else 0, requirements, digest)


def _check_rank(rank: Any, requirements: Requirements, digest: str) -> None:
    if isinstance(rank, int) and rank > requirements.max_rank:
        what = f"has rank {rank}; this engine serves up to {requirements.max_rank}"
        raise refused("rank", digest, what, "Train it with a lower tuning.rank, or raise the engine's limit.")


def _tensor(raw: RawTensor) -> Tensor:
    return torch.frombuffer(raw.data, dtype=_DTYPES[raw.dtype]).reshape(raw.shape)


_SMALLER = "Train it with a lower rank or fewer targets."
_SAFETENSORS = "Publish adapter_config.json and adapter_model.safetensors, and no other weights."
_PLAIN = "Save it with PEFT as plain LoRA, target_modules as a list of names."


def refused(check: str, digest: str, what: str, hint: str) -> AdapterError:
    assert check in CHECKS
    return AdapterError(f"The adapter {digest} {what}.", hint=hint, adapter=digest, check=check)
