"""How two adapters differ: configuration, spec, data, metrics, and how far their weights are apart, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from orchestrator.modeling.adapter_check import numbers
from orchestrator.modeling.adapter_files import AdapterConfig, raw_tensors, read_adapter_config, split_name
from orchestrator.registry.verification import Fetched


class Change(BaseModel):
    """One field that differs; None on a side that does not have it."""

    field: str
    a: Any
    b: Any


class ModuleDifference(BaseModel):
    """Frobenius norms of a module's weight update, scale·B·A, [out, in]."""

    module: str
    a: float | None
    """None: the adapter does not touch this module."""
    b: float | None
    difference: float
    """Of the difference of the two updates."""


class Difference(BaseModel):
    a: str
    b: str
    """Digests."""
    same_base: bool
    config: list[Change]
    spec: list[Change]
    data: list[Change]
    """SHA-256 of each source."""
    metrics: list[Change]
    modules: list[ModuleDifference]
    """Those whose updates differ, the furthest apart first; empty unless both are LoRA adapters."""
    relative: float | None
    """Norm of the whole difference, divided by the larger of the two updates' norms; None as above."""


def difference(a: Fetched, b: Fetched) -> Difference:
    """Exact up to float64's rounding; nothing as large as the base's weights is ever built."""
    lora = a.summary.kind == b.summary.kind == "lora"
    modules = _modules(a.directory, b.directory) if lora else []
    return Difference(
        a=a.summary.digest,
        b=b.summary.digest,
        same_base=a.summary.base_digest == b.summary.base_digest,
        config=_changes(_config(a), _config(b)),
        spec=_changes(*(_flat(one.provenance.spec.get("spec", {})) for one in (a, b))),
        data=_changes(a.provenance.data, b.provenance.data),
        metrics=_changes(_metrics(a), _metrics(b)),
        modules=sorted((m for m in modules if m.difference), key=lambda m: -m.difference),
        relative=_relative(modules) if lora else None,
    )


def _config(one: Fetched) -> dict[str, Any]:
    kept = ("kind", "base_digest", "dtype", "parameters")
    facts = {name: getattr(one.summary, name) for name in kept}
    return facts | (read_adapter_config(one.directory).canonical() if one.summary.kind == "lora" else {})


def _metrics(one: Fetched) -> dict[str, float]:
    after = {f"evaluation.{name}": value for name, value in one.summary.evaluation.items()}
    return one.summary.metrics | after


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    names = sorted(a.keys() | b.keys())
    return [Change(field=name, a=a.get(name), b=b.get(name)) for name in names if a.get(name) != b.get(name)]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """`{"train": {"epochs": 1}}` → `{"train.epochs": 1}`"""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{path}.{name}" if path else name)
    return flat


# --- weights --------------------------------------------------------------------------------------------------------

_Pair = tuple[np.ndarray, np.ndarray]


def _modules(a: Path, b: Path) -> list[ModuleDifference]:
    ours, theirs = _updates(a), _updates(b)
    found = []
    for module in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(module), theirs.get(module)
        norms = (_norm(one) if one else None, _norm(other) if other else None)
        found.append(ModuleDifference(module=module, a=norms[0], b=norms[1], difference=_apart(one, other)))
    return found


def _apart(one: _Pair | None, other: _Pair | None) -> float:
    """Norm of the difference; of two updates that have no place in common, of different modules or widths, of both."""
    if one is None or other is None or _shape(one) != _shape(other):
        return float(np.sqrt(sum(_norm(pair) ** 2 for pair in (one, other) if pair is not None)))
    if all(map(np.array_equal, one, other)):
        return 0.0  # and not the rounding of their difference
    return _norm((np.hstack([one[0], -other[0]]), np.vstack([one[1], other[1]])))


def _shape(pair: _Pair) -> tuple[int, int]:
    return pair[0].shape[0], pair[1].shape[1]


def _updates(directory: Path) -> dict[str, _Pair]:
    """scale·B [out, rank] and A [rank, in] of each module, in float64."""
    config: AdapterConfig = read_adapter_config(directory)
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in raw_tensors(directory).items():
        split, values = split_name(name), numbers(tensor)
        assert split is not None  # the adapter is verified
        assert values is not None
        sides.setdefault(split[0], {})[split[1]] = values.astype(np.float64).reshape(tensor.shape)
    return {module: (pair["B"] * config.scale_of(module), pair["A"]) for module, pair in sides.items()}


def _norm(pair: _Pair) -> float:
    """Frobenius norm of B·A from its factors' triangles: ‖B·A‖ = ‖R_B·R_Aᵀ‖, as Q has orthonormal columns. Unlike the
    product of Gram matrices it does not lose half of the digits where two nearly equal updates cancel."""
    b, a = (np.asarray(np.linalg.qr(matrix, mode="r")) for matrix in (pair[0], pair[1].T))
    return float(np.linalg.norm(b @ a.T))


def _relative(modules: list[ModuleDifference]) -> float:
    def total(values: list[float]) -> float:
        return float(np.sqrt(sum(value**2 for value in values)))

    larger = max(total([m.a or 0.0 for m in modules]), total([m.b or 0.0 for m in modules]))
    return total([m.difference for m in modules]) / larger if larger else 0.0
