"""The difference of two adapters against the same computed with dense matrices (2 s)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.modeling.adapter_files import AdapterConfig, read_adapter, write_adapter
from orchestrator.modeling.base_model import BaseModel
from orchestrator.registry.adapters import publish_adapter
from orchestrator.registry.difference import Difference, difference
from orchestrator.registry.provenance import Provenance
from orchestrator.registry.signing import Keys
from orchestrator.registry.verification import fetch_verified
from orchestrator.store import Store

Compare = Callable[..., Difference]
LAYER = "model.layers.0.self_attn."


@pytest.fixture
def compare(
    store: Store, base: BaseModel, provenance: Callable[..., Provenance], keys: Keys, tmp_path: Path
) -> Compare:
    """Publish two directories, with changes to the second one's provenance, and compare what comes back."""

    def run(a: Path, b: Path, **changes: Any) -> Difference:
        fetched = []
        for number, (directory, updates) in enumerate(((a, {}), (b, changes))):
            made = provenance().model_copy(update=updates)
            digest = publish_adapter(store, directory, made.base_model.digest, made, keys=keys)
            fetched.append(fetch_verified(store, digest, tmp_path / f"{number}-{digest[7:19]}", keys.trust()))
        return difference(*fetched)

    return run


def write(directory: Path, rank: int, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    targets = tuple(sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}))
    write_adapter(directory, AdapterConfig(rank, 8.0, targets, **settings), tensors)
    return directory


def pair(module: str, rank: int, seed: int, out: int = 64, width: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def dense(directory: Path) -> dict[str, torch.Tensor]:
    config, tensors = read_adapter(directory)
    found = {}
    for name, a in tensors.items():
        module, side = name.removeprefix("base_model.model.").split(".lora_")
        if side == "A.weight":
            b = tensors[name.replace("lora_A", "lora_B")]
            found[module] = config.scale_of(module) * b.double() @ a.double()
    return found


def test_norms_of_other_ranks_scales_and_modules(compare: Compare, tmp_path: Path) -> None:
    shared, only_a, only_b = f"{LAYER}q_proj", f"{LAYER}v_proj", f"{LAYER}o_proj"
    a = write(tmp_path / "a", 4, pair(shared, 4, 0) | pair(only_a, 4, 1, out=32))
    b = write(tmp_path / "b", 2, pair(shared, 2, 2) | pair(only_b, 2, 3), rslora=True)
    found, da, db = compare(a, b), dense(a), dense(b)
    modules = {m.module: m for m in found.modules}
    assert modules.keys() == {shared, only_a, only_b}
    assert [m.difference for m in found.modules] == sorted((m.difference for m in found.modules), reverse=True)
    assert modules[shared].a == pytest.approx(da[shared].norm().item(), rel=1e-12)
    assert modules[shared].b == pytest.approx(db[shared].norm().item(), rel=1e-12)
    assert modules[shared].difference == pytest.approx((da[shared] - db[shared]).norm().item(), rel=1e-12)
    assert (modules[only_a].b, modules[only_b].a) == (None, None)
    assert modules[only_a].difference == modules[only_a].a
    whole = torch.stack([(da[shared] - db[shared]).norm(), da[only_a].norm(), db[only_b].norm()]).norm()
    larger = max(torch.stack([m.norm() for m in d.values()]).norm() for d in (da, db))
    assert found.relative == pytest.approx((whole / larger).item(), rel=1e-12)
    assert {change.field for change in found.config} == {"parameters", "r", "target_modules", "use_rslora"}


def test_nearly_equal_updates_keep_their_digits(compare: Compare, tmp_path: Path) -> None:
    module = f"{LAYER}q_proj"
    tensors = pair(module, 4, 0)
    nudged = dict(tensors)
    step = torch.zeros(64, 4)
    step[3, 1] = 2.0**-20
    nudged[f"{module}.lora_B.weight"] = tensors[f"{module}.lora_B.weight"] + step
    a, b = write(tmp_path / "a", 4, tensors), write(tmp_path / "b", 4, nudged)
    (one,) = compare(a, b).modules
    expected = (dense(a)[module] - dense(b)[module]).norm().item()
    assert one.difference == pytest.approx(expected, rel=1e-6)
    assert one.difference < 1e-4 * (one.a or 0)


def test_an_adapter_and_itself(compare: Compare, trained: Callable[..., Path]) -> None:
    found = compare(trained(), trained())
    assert (found.config, found.spec, found.data, found.metrics, found.modules) == ([], [], [], [], [])
    assert (found.same_base, found.relative) == (True, 0.0)


def test_another_spec_data_metrics_and_base(
    compare: Compare, trained: Callable[..., Path], provenance: Callable[..., Provenance]
) -> None:
    made = provenance()
    spec = json.loads(json.dumps(made.spec))
    spec["spec"]["train"]["epochs"] = 9
    other = made.base_model.model_copy(update={"digest": "sha256:" + "9" * 64})
    found = compare(
        trained(),
        trained(1),
        spec=spec,
        data={"rows.jsonl": "3" * 64, "new.jsonl": "4" * 64},
        metrics={"train_loss": 0.25},
        base_model=other,
    )
    assert [(c.field, c.b) for c in found.spec] == [("train.epochs", 9)]
    assert [(c.field, c.a, c.b) for c in found.data] == [
        ("hf:x", "2" * 64, None),
        ("new.jsonl", None, "4" * 64),
        ("rows.jsonl", "1" * 64, "3" * 64),
    ]
    assert [(c.field, c.a, c.b) for c in found.metrics] == [("train_loss", 0.5, 0.25)]
    assert [c.field for c in found.config] == ["base_digest"]
    assert not found.same_base
    assert found.relative is not None
    assert found.relative > 0.5


def test_updates_of_other_widths_have_nothing_in_common(compare: Compare, tmp_path: Path) -> None:
    module = f"{LAYER}q_proj"
    a = write(tmp_path / "a", 2, pair(module, 2, 0))
    b = write(tmp_path / "b", 2, pair(module, 2, 0, width=32))
    (one,) = compare(a, b).modules
    assert one.difference == pytest.approx(((one.a or 0) ** 2 + (one.b or 0) ** 2) ** 0.5)
