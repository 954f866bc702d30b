"""A served tiny base, adapters of it, and a real store to publish them in, also as somebody who means harm would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.modeling.adapter_files import AdapterConfig, adapter_digest, write_adapter
from orchestrator.modeling.loading import load_model
from orchestrator.store import Store, adapter_path
from serving.adapters.admission import Requirements
from serving.adapters.loader import LoaderSettings
from serving.engine.network import ServedNetwork

BASE = "sha256:" + "b" * 64


@pytest.fixture
def store(home: Path) -> Store:
    return Store(str(home / "store"))


@pytest.fixture(scope="session")
def served(tiny_model: Callable[[str], Path]) -> ServedNetwork:
    return ServedNetwork(load_model(tiny_model("llama"), dtype=torch.float32).eval())


@pytest.fixture(scope="session")
def requirements(served: ServedNetwork) -> Requirements:
    return Requirements(BASE, served.places, torch.float32, max_rank=16)


@pytest.fixture
def settings(store: Store, home: Path, requirements: Requirements) -> LoaderSettings:
    return LoaderSettings(store.url, home / "disk", 1 << 30, requirements)


Change = Callable[[dict[str, torch.Tensor], AdapterConfig], Any]


@pytest.fixture
def write(tmp_path: Path, requirements: Requirements) -> Callable[..., Path]:
    """`write(seed, rank=…, change=…)` → an adapter's directory; `change` gets the tensors before they are written."""

    def make(seed: int = 0, rank: int = 4, change: Change | None = None, **config: Any) -> Path:
        made = AdapterConfig(rank, 2.0 * rank, config.pop("target_modules", ("q_proj", "down_proj")), **config)
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for module, place in sorted(requirements.places.items()):
            if module.endswith(("q_proj", "down_proj")):
                tensors[f"{module}.lora_A.weight"] = torch.randn(rank, place.in_features, generator=generator) * 0.3
                tensors[f"{module}.lora_B.weight"] = torch.randn(place.out_features, rank, generator=generator) * 0.3
        if change is not None:
            change(tensors, made)
        write_adapter(tmp_path / f"adapter-{seed}", made, tensors)
        return tmp_path / f"adapter-{seed}"

    return make


@pytest.fixture
def publish(store: Store) -> Callable[..., str]:
    """Publish a directory under its own digest, or under another; the manifest says what it is told to say."""

    def put(directory: Path, base: str = BASE, digest: str | None = None, **metadata: Any) -> str:
        digest = digest or adapter_digest(directory, base)
        store.publish(adapter_path(digest), directory, metadata)
        return digest

    return put


def set_config(directory: Path, **values: Any) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return directory


@pytest.fixture
def configured() -> Callable[..., Path]:
    """`configured(directory, r=…)` changes what the configuration says."""
    return set_config
