"""A tiny base, an adapter of it, the record of the run that trained it, and a key to sign it with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.db import Database, open_database
from orchestrator.modeling.adapter_check import base_modules
from orchestrator.modeling.adapter_files import AdapterConfig, write_adapter
from orchestrator.modeling.base_model import BaseModel, materialize
from orchestrator.registry.provenance import BaseModelRecord, Provenance
from orchestrator.registry.signing import Keys
from orchestrator.runs.result import EvaluationResult, RunResult
from orchestrator.runs.states import RunState
from orchestrator.spec.job import JobSpec
from orchestrator.spec.resolved import RemoteData, ResolvedData, ResolvedSpec, StoredFile
from orchestrator.store import Store, result_path, spec_path


@pytest.fixture
def store(home: Path) -> Store:
    return Store(str(home / "store"))


@pytest.fixture
def db(home: Path) -> Iterator[Database]:
    db = open_database(f"sqlite:///{home / 'state.db'}")
    yield db
    db.close()


@pytest.fixture
def keys(home: Path) -> Keys:
    """As the command finds them in this home; made on first use."""
    return Keys(home / "keys" / "signing.pem", own=True)


@pytest.fixture
def cache(home: Path) -> Path:
    return home / "cache"


@pytest.fixture
def base(tiny_model: Callable[[str], Path], cache: Path) -> BaseModel:
    return materialize(str(tiny_model("llama")), cache=cache)


@pytest.fixture
def trained(tmp_path: Path, base: BaseModel) -> Callable[..., Path]:
    """Write an adapter of the base; another seed gives another adapter."""

    def make(seed: int = 0, **settings: Any) -> Path:
        config = AdapterConfig(4, 8.0, ("q_proj", "down_proj"), base_model=base.reference, **settings)
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for module, (out, width) in sorted(base_modules(base.path).items()):
            if module.endswith(config.target_modules):
                tensors[f"{module}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.1
                tensors[f"{module}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.1
        write_adapter(tmp_path / f"trained-{seed}", config, tensors)
        return tmp_path / f"trained-{seed}"

    return make


@pytest.fixture
def provenance(base: BaseModel, store: Store) -> Callable[..., Provenance]:
    def make(run: str = "intents-abc234", name: str = "intents", tenant: str = "acme") -> Provenance:
        spec = JobSpec(
            name=name, tenant=tenant, base_model=base.reference, data={"train": "rows.jsonl", "test": "hf:x"}
        )
        resolved = ResolvedSpec(
            run=run,
            spec=spec,
            data=ResolvedData(
                train=[StoredFile(name="rows.jsonl", sha256="1" * 64, size=9)],
                validation=0.1,
                test=[RemoteData(uri="hf:x")],
            ),
            base_model=base.reference,
            store_url=store.url,
            git_commit="c0ffee",
            created_at=time.time(),
        )
        return Provenance.of(
            resolved,
            BaseModelRecord(reference=base.reference, digest=base.digest, model_type=base.model_type),
            attempt=1,
            step=40,
            metrics={"train_loss": 0.5},
            evaluation=EvaluationResult(rows=8, before={"exact_match": 0.0}, after={"exact_match": 0.75}),
            data={"hf:x": "2" * 64},
            hardware={"gpus": 0},
        )

    return make


@pytest.fixture
def finished(store: Store) -> Callable[[Provenance, str], None]:
    """What a run leaves in the store when it has published an adapter."""

    def write(made: Provenance, digest: str) -> None:
        store.write_json(spec_path(made.run), made.spec)
        result = RunResult(attempt=1, state=RunState.SUCCEEDED, adapter=digest, finished_at=made.created_at)
        store.write_json(result_path(made.run), result.model_dump(mode="json"))

    return write
