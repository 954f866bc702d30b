"""What a job would refuse about a base model, said before there is a job: from its files' headers, without torch."""

from __future__ import annotations

import re

from orchestrator.errors import ModelError
from orchestrator.modeling.base_model import BaseModelInfo
from orchestrator.modeling.model_files import require_chat_template, require_tokenizer, tensor_shapes, weight_files
from orchestrator.spec.job import FullTuning, JobSpec

_FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""The families whose tensors have the names of their modules. What others adapt is known once the model is built."""
_LINEAR = re.compile(r"(.+\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj))\.weight")


def check_job(spec: JobSpec, info: BaseModelInfo) -> None:
    """
    Raises:
        ModelError: no tokenizer, no chat template for rows that need one, a target that matches no module, or a rank above a layer's
            width. A model that is not on this machine yet is left to the job.
    """
    if info.path is None or info.config is None:
        return
    if info.source != "hub":  # the hub's client finishes an interrupted download by itself
        require_tokenizer(info.path, spec.base_model)
    if spec.data.format != "text":
        require_chat_template(info.path, spec.base_model)
    if not isinstance(spec.tuning, FullTuning) and info.config.get("model_type") in _FUSED:
        check_targets(spec.tuning.targets, spec.tuning.rank, _linears(info))


def check_targets(targets: str | list[str], rank: int, linears: dict[str, int]) -> None:
    """
    Args:
        linears: module name → its smaller side.

    Raises:
        ModelError: as above.
    """
    chosen = linears if isinstance(targets, str) else {}
    for target in () if isinstance(targets, str) else targets:
        found = {name: side for name, side in linears.items() if name == target or name.endswith(f".{target}")}
        if not found:
            raise ModelError(
                f"tuning.targets: {target!r} matches no linear module of this model.",
                hint=f"These do: {', '.join(sorted({name.rsplit('.', 1)[-1] for name in linears}))}; or write all-linear.",
                target=target,
            )
        chosen = chosen | found
    for name, side in chosen.items():
        if rank > side:
            raise ModelError(
                f"tuning.rank: {rank} is above the width of {name} ({side}).",
                hint=f"Use a rank of at most {min(chosen.values())}, or leave that module out of tuning.targets.",
                rank=rank,
            )


def _linears(info: BaseModelInfo) -> dict[str, int]:
    assert info.path is not None
    shapes = [tensor_shapes(file, info.reference) for file in weight_files(info.path, info.reference)]
    named = {_LINEAR.fullmatch(name): shape for held in shapes for name, shape in held.items()}
    return {match[1]: min(shape) for match, shape in named.items() if match}
