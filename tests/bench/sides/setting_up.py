"""What benchmarks of serving need before they begin: the model, adapters, things to ask."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.replica import EngineOptions


def base_model() -> Path:
    from orchestrator.modeling.base_model import materialize
    from orchestrator.settings import load_settings

    return materialize("smollm2-135m-instruct", cache=load_settings().cache, say=print).path


def base_digest(model: Path) -> str:
    from orchestrator.modeling.base_model import materialize
    from orchestrator.settings import load_settings

    return materialize(str(model), cache=load_settings().cache).digest


def new_adapter(model: Path, rank: int, seed: int, directory: Path) -> Path:
    """A random adapter of every linear, in bf16; what was in the directory is gone."""
    import torch

    from orchestrator.modeling.adapter_check import base_modules
    from orchestrator.modeling.adapter_files import AdapterConfig, write_adapter

    linears = {n: s for n, s in sorted(base_modules(model).items()) if n != "lm_head"}
    config = AdapterConfig(rank, 2.0 * rank, tuple(sorted({n.rpartition(".")[2] for n in linears})))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (out, width) in linears.items():
        tensors[f"{name}.lora_A.weight"] = (torch.randn(rank, width, generator=generator) * 0.02).bfloat16()
        tensors[f"{name}.lora_B.weight"] = (torch.randn(out, rank, generator=generator) * 0.02).bfloat16()
    shutil.rmtree(directory, ignore_errors=True)
    write_adapter(directory, config, tensors)
    return directory


def questions(count: int) -> list[str]:
    """Distinct sentences of the finance example."""
    from jobs.data.catalogue import example_rows
    from jobs.data.formats import conversations
    from orchestrator.settings import load_settings

    rows = conversations(example_rows("finance-entities/train", load_settings().cache))
    texts = dict.fromkeys(str(conversation.messages[-2]["content"]) for conversation, _ in rows)
    found = list(islice(texts, count))
    if len(found) < count:
        raise SystemExit(f"The example has {len(found)} sentences, and {count} are asked for.")
    return found


def http_options(case: dict[str, Any], base: str) -> EngineOptions:
    """The engine of both sides of `http_overhead`."""
    from orchestrator.registry.signing import Keys
    from orchestrator.settings import load_settings
    from serving.replica import EngineOptions

    settings = load_settings()
    return EngineOptions(
        reference=case["model"],
        digest=base,
        store_url=settings.store,
        cache=settings.cache,
        trust=Keys.of(settings).trust(),
        max_length=1024,
        max_sequences=32,
        threads=1,
    )
