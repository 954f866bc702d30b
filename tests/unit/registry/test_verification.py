"""Each way in which a published adapter can stop being what it was (5 s)."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from orchestrator.errors import AdapterError, AdapterNotFound, CorruptObject, ObjectMissing, SignatureInvalid
from orchestrator.modeling.base_model import BaseModel
from orchestrator.registry.adapters import get_adapter, publish_adapter
from orchestrator.registry.provenance import Provenance
from orchestrator.registry.signing import Keys, Trust, fingerprint
from orchestrator.registry.verification import Fetched, fetch_verified, sign_published, verify
from orchestrator.store import MANIFEST, Store, adapter_path, sha256_file

WEIGHTS = "adapter_model.safetensors"
Failed = Callable[..., dict[str, str]]


@pytest.fixture
def published(
    store: Store, base: BaseModel, trained: Callable[..., Path], provenance: Callable[..., Provenance], keys: Keys
) -> tuple[str, Path]:
    """Digest and directory in the store."""
    digest = publish_adapter(store, trained(), base.digest, provenance(), keys=keys)
    return digest, Path(store.full(adapter_path(digest)))


@pytest.fixture
def failed(store: Store, keys: Keys) -> Failed:
    """What `verify` finds wrong, by check."""

    def ask(digest: str, base: Path | None = None) -> dict[str, str]:
        report = verify(store, digest, trust=keys.trust(), base=base)
        return {finding.check: finding.detail for finding in report.findings if not finding.ok}

    return ask


def restate(directory: Path) -> None:
    """Make the manifest fit the files again, as somebody would who wants a change to go unseen."""
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    for name, entry in manifest["files"].items():
        entry.update(size=(directory / name).stat().st_size, sha256=sha256_file(directory / name))
    file.write_text(json.dumps(manifest))


def test_a_good_one(store: Store, published: tuple[str, Path], base: BaseModel, keys: Keys) -> None:
    report = verify(store, published[0], trust=keys.trust(), base=base.path)
    assert report.ok
    report.require()
    assert [finding.check for finding in report.findings] == [
        *("bytes", "signature", "modules", "shapes", "numbers are finite", "size of the update"),
        *("has an effect", "digest", "provenance"),
    ]


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "provenance.json", "README.md", "model.sig"])
@pytest.mark.parametrize("place", [0, 60, -1])
def test_one_bit_flipped(name: str, place: int, store: Store, published: tuple[str, Path], keys: Keys) -> None:
    digest, directory = published
    data = bytearray((directory / name).read_bytes())
    data[place] ^= 4
    (directory / name).write_bytes(data)
    report = verify(store, digest, trust=keys.trust())
    assert [(finding.check, finding.ok) for finding in report.findings] == [("bytes", False)]
    with pytest.raises(AdapterError, match="is not what was published") as caught:
        report.require()
    assert caught.value.context["check"] == "bytes"


@pytest.mark.parametrize("name", [WEIGHTS, "provenance.json"])
def test_a_file_gone(name: str, failed: Failed, published: tuple[str, Path]) -> None:
    (published[1] / name).unlink()
    assert set(failed(published[0])) == {"bytes"}


def test_nothing_there(store: Store) -> None:
    with pytest.raises(AdapterNotFound):
        verify(store, "sha256:" + "0" * 64, trust=Trust(()))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load((directory / WEIGHTS).read_bytes())
    change(tensors)
    (directory / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    restate(directory)


def test_weights_changed_and_the_manifest_with_them(failed: Failed, published: tuple[str, Path]) -> None:
    digest, directory = published
    change_weights(directory, lambda tensors: next(iter(tensors.values())).add_(1e-6))
    assert set(failed(digest)) == {"signature", "digest"}


def test_not_finite(failed: Failed, published: tuple[str, Path]) -> None:
    digest, directory = published
    change_weights(directory, lambda tensors: next(iter(tensors.values()))[0, 0].fill_(float("nan")))
    assert set(failed(digest)) == {"signature", "numbers are finite", "digest"}


def test_no_effect(failed: Failed, published: tuple[str, Path]) -> None:
    digest, directory = published
    change_weights(directory, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    assert set(failed(digest)) == {"signature", "has an effect", "digest"}


def test_another_alpha(failed: Failed, published: tuple[str, Path]) -> None:
    digest, directory = published
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 80}))
    restate(directory)
    assert set(failed(digest)) == {"signature", "digest", "provenance"}


def test_another_base(failed: Failed, published: tuple[str, Path], tiny_model: Callable[[str], Path]) -> None:
    digest, directory = published
    assert set(failed(digest, tiny_model("gemma2"))) == {"shapes"}
    file = directory / "provenance.json"
    record = json.loads(file.read_text())
    record["base_model"]["digest"] = "sha256:" + "0" * 64
    file.write_text(json.dumps(record))
    restate(directory)
    assert set(failed(digest)) == {"signature", "digest", "provenance"}


def test_metrics_made_better_in_the_manifest(failed: Failed, published: tuple[str, Path]) -> None:
    digest, directory = published
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["metadata"]["evaluation"]["exact_match"] = 1.0
    file.write_text(json.dumps(manifest))
    assert failed(digest) == {"provenance": "the manifest states another evaluation"}


def test_a_provenance_that_cannot_be_read(failed: Failed, published: tuple[str, Path]) -> None:
    digest, directory = published
    (directory / "provenance.json").write_text("{}")
    restate(directory)
    assert set(failed(digest)) == {"signature", "provenance"}


# --- what every load goes through -----------------------------------------------------------------------------------


@pytest.fixture
def fetch(store: Store, keys: Keys, tmp_path: Path) -> Callable[[str], Fetched]:
    count = itertools.count()
    return lambda digest: fetch_verified(store, digest, tmp_path / f"loaded{next(count)}", keys.trust())


def test_a_load_tells_what_the_signed_files_tell(
    store: Store, published: tuple[str, Path], fetch: Callable[[str], Fetched], keys: Keys
) -> None:
    fetched = fetch(published[0])
    assert fetched.summary == get_adapter(store, published[0])
    assert fetched.provenance.run == "intents-abc234"
    assert fetched.signer == fingerprint(keys.public())
    assert (fetched.directory / WEIGHTS).read_bytes() == (published[1] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "provenance.json", "README.md"])
def test_a_load_refuses_a_flipped_bit_that_the_manifest_hides(
    name: str, published: tuple[str, Path], fetch: Callable[[str], Fetched]
) -> None:
    digest, directory = published
    data = bytearray((directory / name).read_bytes())
    data[-3] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(CorruptObject, match="the bytes were changed"):
        fetch(digest)
    restate(directory)
    with pytest.raises(SignatureInvalid, match=f"not what was signed: .*{name}") as caught:
        fetch(digest)
    assert caught.value.context["check"] == "signature"


@pytest.mark.parametrize("name", [".gitattributes", "adapter_model.bin", "modeling.py"])
@pytest.mark.parametrize("hidden", [False, True], ids=["unnamed", "named by the manifest"])
def test_a_load_refuses_a_file_more(
    name: str, hidden: bool, published: tuple[str, Path], fetch: Callable[[str], Fetched]
) -> None:
    digest, directory = published
    (directory / name).write_text("import os")
    if hidden:
        file = directory / MANIFEST
        manifest = json.loads(file.read_text())
        manifest["files"][name] = {"size": 0, "sha256": ""}
        file.write_text(json.dumps(manifest))
        restate(directory)
    with pytest.raises(SignatureInvalid, match=re.escape(name)):
        fetch(digest)


@pytest.mark.parametrize("name", ["README.md", "provenance.json", "model.sig"])
def test_a_load_refuses_a_file_less(name: str, published: tuple[str, Path], fetch: Callable[[str], Fetched]) -> None:
    digest, directory = published
    (directory / name).unlink()
    with pytest.raises(ObjectMissing):
        fetch(digest)
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["files"][name]
    file.write_text(json.dumps(manifest))
    with pytest.raises(SignatureInvalid):
        fetch(digest)


def test_a_load_refuses_a_signed_adapter_in_anothers_place(
    store: Store,
    published: tuple[str, Path],
    fetch: Callable[[str], Fetched],
    base: BaseModel,
    trained: Callable[..., Path],
    provenance: Callable[..., Provenance],
    keys: Keys,
) -> None:
    other = publish_adapter(store, trained(1), base.digest, provenance(), keys=keys)
    for file in Path(store.full(adapter_path(other))).iterdir():
        shutil.copyfile(file, published[1] / file.name)
    assert fetch(other)
    with pytest.raises(AdapterError, match=f"is {other}, and it is published as") as caught:
        fetch(published[0])
    assert caught.value.context["check"] == "digest"


def test_a_load_refuses_what_lists_would_show_wrongly(
    published: tuple[str, Path], fetch: Callable[[str], Fetched]
) -> None:
    file = published[1] / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["metadata"]["tenant"] = "other"
    file.write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="another tenant"):
        fetch(published[0])


def test_a_load_refuses_what_is_not_there(fetch: Callable[[str], Fetched]) -> None:
    with pytest.raises(AdapterNotFound):
        fetch("sha256:" + "0" * 64)


# --- signing what is published --------------------------------------------------------------------------------------


@pytest.fixture
def unsigned(
    store: Store, base: BaseModel, trained: Callable[..., Path], provenance: Callable[..., Provenance]
) -> tuple[str, Path]:
    digest = publish_adapter(store, trained(2), base.digest, provenance())
    return digest, Path(store.full(adapter_path(digest)))


def test_unsigned_it_is_loaded_by_nobody_and_signed_once(
    store: Store, unsigned: tuple[str, Path], fetch: Callable[[str], Fetched], keys: Keys, failed: Failed
) -> None:
    digest, directory = unsigned
    with pytest.raises(SignatureInvalid, match="is not signed"):
        fetch(digest)
    assert set(failed(digest)) == {"signature"}
    before = json.loads((directory / MANIFEST).read_text())
    assert sign_published(store, digest, keys)
    assert fetch(digest).summary.run == "intents-abc234"
    after = json.loads((directory / MANIFEST).read_text())
    assert after["metadata"] == before["metadata"]
    assert after["files"].keys() - before["files"].keys() == {"model.sig"}
    kept = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert not sign_published(store, digest, keys)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == kept


def test_what_is_not_its_digest_is_not_signed(store: Store, unsigned: tuple[str, Path], keys: Keys) -> None:
    digest, directory = unsigned
    change_weights(directory, lambda tensors: next(iter(tensors.values())).add_(1e-3))
    with pytest.raises(AdapterError, match="and it is published as"):
        sign_published(store, digest, keys)
    assert not (directory / "model.sig").exists()


def test_another_key_counts_once_it_is_trusted_and_is_then_replaced(
    store: Store, published: tuple[str, Path], fetch: Callable[[str], Fetched], keys: Keys, tmp_path: Path
) -> None:
    digest, directory = published
    other = Keys(tmp_path / "other" / "signing.pem", own=True)
    other.public()
    with pytest.raises(SignatureInvalid, match="is signed by the key"):
        fetch_verified(store, digest, tmp_path / "x", other.trust())
    before = (directory / "model.sig").read_bytes()
    with pytest.raises(SignatureInvalid, match="is signed by the key"):
        sign_published(store, digest, other)
    assert (directory / "model.sig").read_bytes() == before
    knowing = Keys(other.private, own=True, trusted=(keys.private.with_suffix(".pub"),))
    assert fetch_verified(store, digest, tmp_path / "y", knowing.trust()).signer == fingerprint(keys.public())
    assert sign_published(store, digest, knowing)
    with pytest.raises(SignatureInvalid):
        fetch(digest)
    assert fetch_verified(store, digest, tmp_path / "z", other.trust())
