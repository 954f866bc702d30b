"""Each way in which a published adapter can stop being what it was (2 s)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from orchestrator.errors import AdapterError, ObjectMissing
from orchestrator.modeling.base_model import BaseModel
from orchestrator.registry.adapters import publish_adapter
from orchestrator.registry.provenance import Provenance
from orchestrator.registry.verification import verify
from orchestrator.store import MANIFEST, Store, adapter_path, sha256_file

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def published(
    store: Store, base: BaseModel, trained: Callable[..., Path], provenance: Callable[..., Provenance]
) -> tuple[str, Path]:
    """Digest and directory in the store."""
    digest = publish_adapter(store, trained(), base.digest, provenance())
    return digest, Path(store.full(adapter_path(digest)))


def failed(store: Store, digest: str, base: Path | None = None) -> dict[str, str]:
    return {finding.check: finding.detail for finding in verify(store, digest, base=base).findings if not finding.ok}


def restate(directory: Path) -> None:
    """Make the manifest fit the files again, as somebody would who wants a change to go unseen."""
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    for name, entry in manifest["files"].items():
        entry.update(size=(directory / name).stat().st_size, sha256=sha256_file(directory / name))
    file.write_text(json.dumps(manifest))


def test_a_good_one(store: Store, published: tuple[str, Path], base: BaseModel) -> None:
    report = verify(store, published[0], base=base.path)
    assert report.ok
    report.require()
    assert [finding.check for finding in report.findings] == [
        *("bytes", "modules", "shapes", "numbers are finite", "size of the update"),
        *("has an effect", "digest", "provenance"),
    ]


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "provenance.json", "README.md"])
@pytest.mark.parametrize("place", [0, 60, -1])
def test_one_bit_flipped(name: str, place: int, store: Store, published: tuple[str, Path]) -> None:
    digest, directory = published
    data = bytearray((directory / name).read_bytes())
    data[place] ^= 4
    (directory / name).write_bytes(data)
    report = verify(store, digest)
    assert [(finding.check, finding.ok) for finding in report.findings] == [("bytes", False)]
    with pytest.raises(AdapterError, match="is not what was published") as caught:
        report.require()
    assert caught.value.context["check"] == "bytes"


@pytest.mark.parametrize("name", [WEIGHTS, "provenance.json"])
def test_a_file_gone(name: str, store: Store, published: tuple[str, Path]) -> None:
    (published[1] / name).unlink()
    assert set(failed(store, published[0])) == {"bytes"}


def test_nothing_there(store: Store) -> None:
    with pytest.raises(ObjectMissing):
        verify(store, "sha256:" + "0" * 64)


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load((directory / WEIGHTS).read_bytes())
    change(tensors)
    (directory / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    restate(directory)


def test_weights_changed_and_the_manifest_with_them(store: Store, published: tuple[str, Path]) -> None:
    digest, directory = published
    change_weights(directory, lambda tensors: next(iter(tensors.values())).add_(1e-6))
    assert set(failed(store, digest)) == {"digest"}


def test_not_finite(store: Store, published: tuple[str, Path]) -> None:
    digest, directory = published
    change_weights(directory, lambda tensors: next(iter(tensors.values()))[0, 0].fill_(float("nan")))
    assert set(failed(store, digest)) == {"numbers are finite", "digest"}


def test_no_effect(store: Store, published: tuple[str, Path]) -> None:
    digest, directory = published
    change_weights(directory, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    assert set(failed(store, digest)) == {"has an effect", "digest"}


def test_another_alpha(store: Store, published: tuple[str, Path]) -> None:
    digest, directory = published
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 80}))
    restate(directory)
    assert set(failed(store, digest)) == {"digest", "provenance"}


def test_another_base(store: Store, published: tuple[str, Path], tiny_model: Callable[[str], Path]) -> None:
    digest, directory = published
    assert set(failed(store, digest, tiny_model("gemma2"))) == {"shapes"}
    file = directory / "provenance.json"
    record = json.loads(file.read_text())
    record["base_model"]["digest"] = "sha256:" + "0" * 64
    file.write_text(json.dumps(record))
    restate(directory)
    assert set(failed(store, digest)) == {"digest", "provenance"}


def test_metrics_made_better_in_the_manifest(store: Store, published: tuple[str, Path]) -> None:
    digest, directory = published
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["metadata"]["evaluation"]["exact_match"] = 1.0
    file.write_text(json.dumps(manifest))
    assert failed(store, digest) == {"provenance": "the manifest states another evaluation"}


def test_a_provenance_that_cannot_be_read(store: Store, published: tuple[str, Path]) -> None:
    digest, directory = published
    (directory / "provenance.json").write_text("{}")
    restate(directory)
    assert set(failed(store, digest)) == {"provenance"}
