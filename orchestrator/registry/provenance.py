"""Where an adapter came from: `provenance.json` beside its weights."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.runs.result import EvaluationResult
from orchestrator.spec.resolved import ResolvedSpec, StoredFile

PROVENANCE_FILE = "provenance.json"

_PACKAGES = (
    *("adaptory", "torch", "transformers", "ray", "peft", "deepspeed", "bitsandbytes", "safetensors", "tokenizers"),
    *("datasets", "numpy"),
)


class BaseModelRecord(BaseModel):
    reference: str
    """As the job spec named it."""
    digest: str
    """`sha256:…` of the weights and configuration it had."""
    model_type: str
    loadable_name: str | None = None
    """What `from_pretrained` takes: a hub id, if it has one."""


class ImportRecord(BaseModel):
    """Of an adapter that was trained elsewhere."""

    source: str
    """The directory it came from, as it was named."""
    by: str
    """Who imported it."""


class SweepRecord(BaseModel):
    """Of an adapter that won a sweep; the spec beside it is that of its trial."""

    trial: str
    """`t05`: its name in the sweep, whose run id is the adapter's."""
    config: dict[str, Any]
    """Field (`train.learning_rate`) → value, of those that were searched."""
    search: dict[str, Any]
    """Field → range that it was found in."""
    metric: str
    value: float | None = None
    """What it won by."""
    trials: dict[str, int]
    """State → how many there were."""
    placement: str


class Origin(BaseModel):
    """Which run an adapter is from: told by its provenance, and again by the summary that lists read."""

    tenant: str
    name: str
    """Of the run, or the one it was imported under."""
    run: str | None = None
    """Run id; None, with what belongs to it, for an adapter that was trained elsewhere."""
    attempt: int | None = None
    step: int | None = None
    """Optimiser step whose weights these are."""
    created_at: float
    """Seconds since the epoch."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Last values of the training, and what the published files were compared by."""


class Provenance(Origin):
    """Everything needed to say how an adapter was made, and to make it again."""

    model_config = ConfigDict(extra="ignore")  # written by a later version, still readable

    schema_version: Literal[1] = 1
    base_model: BaseModelRecord
    spec: dict[str, Any] = Field(default_factory=dict)
    """The resolved spec, as JSON."""
    data: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each data source, by its name."""
    git_commit: str | None = None
    """Of the directory the run was submitted from."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of Python and the packages that made it."""
    hardware: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    """Of activations and frozen weights in training."""
    evaluation: EvaluationResult | None = None
    imported: ImportRecord | None = None
    sweep: SweepRecord | None = None

    @staticmethod
    def of(
        resolved: ResolvedSpec,
        base: BaseModelRecord,
        *,
        attempt: int,
        step: int,
        metrics: dict[str, float],
        evaluation: EvaluationResult | None = None,
        data: dict[str, str] | None = None,
        hardware: dict[str, Any] | None = None,
        sweep: SweepRecord | None = None,
    ) -> Provenance:
        """The record of a run on this machine.

        Args:
            data: digests of sources that the job itself read (`s3://…`, `example:…`); stored files are added.
            hardware: what only the workers know, such as GPUs and their number.
        """
        sources = [*resolved.data.train, *resolved.data.test]
        sources += resolved.data.validation if isinstance(resolved.data.validation, list) else []
        stored = {source.name: source.sha256 for source in sources if isinstance(source, StoredFile)}
        return Provenance(
            tenant=resolved.spec.tenant,
            name=resolved.spec.name,
            run=resolved.run,
            attempt=attempt,
            step=step,
            created_at=time.time(),
            base_model=base,
            spec=resolved.model_dump(mode="json"),
            data=(data or {}) | stored,
            git_commit=resolved.git_commit,
            versions=package_versions(),
            hardware=this_machine() | (hardware or {}),
            seed=resolved.spec.train.seed,
            dtype=resolved.spec.train.dtype,
            metrics=metrics,
            evaluation=evaluation,
            sweep=sweep,
        )


def package_versions() -> dict[str, str]:
    """Of Python and what is installed of the packages that decide a result; nothing is imported."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def this_machine() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
