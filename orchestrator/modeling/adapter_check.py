"""Whether an adapter can be what it claims: complete pairs, shapes that fit, finite numbers, an effect. Without torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from orchestrator.errors import AdapterError
from orchestrator.modeling.adapter_files import AdapterConfig, RawTensor, raw_tensors, read_adapter_config, split_name
from orchestrator.modeling.model_files import read_config, tensor_shapes, weight_files

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt"})
"""Architectures that keep a linear's weight as [in, out]."""

_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "position_embeddings")
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

Check = Literal["names", "shape", "finite", "effect"]


class Problem(NamedTuple):
    check: Check
    message: str


def check_adapter(directory: Path, base: Path | None = None) -> None:
    """
    Args:
        base: the base model's directory; without it, shapes are only checked against each other.

    Raises:
        AdapterError: unreadable, or with any of the `adapter_problems`; the first few are named.
    """
    refuse(adapter_problems(directory, base), str(directory))


def refuse(problems: list[Problem], adapter: str) -> None:
    """
    Args:
        adapter: what the error calls it.

    Raises:
        AdapterError: there are problems; the first few are named.
    """
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterError(
            f"The adapter {adapter} cannot be used: " + "; ".join(p.message for p in problems[:3]) + f"{more}.",
            hint=_HINTS[problems[0].check],
            adapter=adapter,
            check=problems[0].check,
        )


_HINTS: dict[Check, str] = {
    "names": "Check that it was trained on this base model.",
    "shape": "Check that it was trained on this base model, and that no worker's part was saved alone.",
    "finite": "Training diverged: lower train.learning_rate, and start from the last good checkpoint.",
    "effect": "It would answer exactly as the base does: check the learning rate and the number of steps.",
}


def adapter_problems(directory: Path, base: Path | None = None) -> list[Problem]:
    """Everything that is wrong; an empty list for a good adapter.

    Raises:
        AdapterError: the files cannot be read at all.
    """
    config, tensors = read_adapter_config(directory), raw_tensors(directory)
    return content_problems(config, tensors, base_modules(base) if base else None)


def content_problems(
    config: AdapterConfig, tensors: dict[str, RawTensor], linears: Mapping[str, tuple[int, int]] | None
) -> list[Problem]:
    """As `adapter_problems`, of what is read already.

    Args:
        linears: (out, in) of each linear that an adapter may target.
    """
    return list(_problems(config, tensors, linears))


def base_modules(base: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear of a base model, by module name, from the headers of its files.

    Raises:
        ModelError: the base cannot be read.
    """
    config = read_config(base, str(base))
    shapes = {n: s for file in weight_files(base, str(base)) for n, s in tensor_shapes(file, str(base)).items()}
    turned = config.get("model_type") in CONV1D_TYPES
    linears = {
        name.removesuffix(".weight"): (shape[1], shape[0]) if turned else (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name.split(".")[-2] not in _EMBEDDINGS
    }
    if "lm_head" not in linears and (embedding := embedding_name(shapes)):
        linears["lm_head"] = (shapes[embedding][0], shapes[embedding][1])  # tied
    return linears


def embedding_name(names: dict[str, tuple[int, ...]]) -> str | None:
    """The tensor of the input embedding, which a tied output head shares."""
    return next((n for n in names if n.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))), None)


def _problems(
    config: AdapterConfig, tensors: dict[str, RawTensor], linears: Mapping[str, tuple[int, int]] | None
) -> Iterator[Problem]:
    pairs: dict[str, dict[str, RawTensor]] = {}
    for name, tensor in tensors.items():
        if (split := split_name(name)) is None:
            yield Problem("names", f"{name} is no tensor of a plain LoRA adapter")
        else:
            pairs.setdefault(split[0], {})[split[1]] = tensor
    if not pairs:
        yield Problem("names", "it has no LoRA tensors")
        return
    for module, pair in pairs.items():
        if len(pair) < 2:
            yield Problem("names", f"{module} has lora_{next(iter(pair))} and no lora_{'B' if 'A' in pair else 'A'}")
            continue
        yield from _shape_problems(module, pair["A"].shape, pair["B"].shape, config.rank_of(module), linears)
    yield from _target_problems(config, set(pairs))
    yield from _number_problems(pairs)


def _shape_problems(
    module: str, a: tuple[int, ...], b: tuple[int, ...], rank: int, linears: Mapping[str, tuple[int, int]] | None
) -> Iterator[Problem]:
    if len(a) != 2 or len(b) != 2 or 0 in a + b:
        yield Problem("shape", f"{module} has lora_A {list(a)} and lora_B {list(b)}, which are not two full matrices")
        return
    if a[0] != rank or b[1] != rank:
        yield Problem(
            "shape", f"{module} has lora_A {list(a)} and lora_B {list(b)}, the configuration says rank {rank}"
        )
    if rank > min(a[1], b[0]):
        yield Problem("shape", f"{module} has rank {rank}, above its width of {min(a[1], b[0])}")
    if linears is None:
        return
    if (linear := linears.get(module)) is None:
        near = difflib.get_close_matches(module, linears, n=1, cutoff=0.6)
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        yield Problem(
            "names", f"the base has no linear {module}{f' (it has {near[0]})' if near else ''}; its linears are {ends}"
        )
    elif linear != (b[0], a[1]):
        yield Problem("shape", f"{module} is [{b[0]}, {a[1]}] in the adapter and {list(linear)} in the base")


def _target_problems(config: AdapterConfig, modules: set[str]) -> Iterator[Problem]:
    """A loader makes room for `target_modules`; a tensor outside of them is dropped, and one that lacks stays random."""
    if isinstance(config.target_modules, str):
        if config.target_modules != "all-linear":
            lost = sorted(m for m in modules if not re.fullmatch(config.target_modules, m))
            yield from (Problem("names", f"{m} does not match target_modules {config.target_modules!r}") for m in lost)
        return
    for module in sorted(modules):
        if not any(module == t or module.endswith(f".{t}") for t in config.target_modules):
            yield Problem("names", f"{module} is not among target_modules {', '.join(config.target_modules)}")
    for target in config.target_modules:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            yield Problem("names", f"target_modules names {target}, for which there are no tensors")


def _number_problems(pairs: dict[str, dict[str, RawTensor]]) -> Iterator[Problem]:
    effect = False
    for module, pair in pairs.items():
        for side, tensor in pair.items():
            if (numbers := _numbers(tensor)) is None:
                yield Problem("shape", f"{module}.lora_{side} has dtype {tensor.dtype}, not a plain float")
            elif bad := int(numbers.size - np.isfinite(numbers).sum()):
                yield Problem("finite", f"{module}.lora_{side} has {bad} values that are NaN or infinite")
        effect = effect or (len(pair) == 2 and all(_any_nonzero(tensor) for tensor in pair.values()))
    if not effect:
        yield Problem("effect", "it changes nothing: in every module A or B is zero")


def _numbers(tensor: RawTensor) -> np.ndarray | None:
    """Flat values; bfloat16 is the upper half of a float32."""
    if tensor.dtype == "BF16":
        return (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    kind = _NUMPY.get(tensor.dtype)
    return np.frombuffer(tensor.data, kind) if kind else None


def _any_nonzero(tensor: RawTensor) -> bool:
    numbers = _numbers(tensor)
    return numbers is not None and bool(np.any(numbers))
