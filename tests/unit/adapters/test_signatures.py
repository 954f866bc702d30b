"""Who signed an adapter decides whether it is loaded, also by the loader's own process. About ten seconds."""

from __future__ import annotations

import asyncio
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import SignatureInvalid
from orchestrator.registry.signing import SIGNATURE_FILE, Keys, Trust
from orchestrator.store import MANIFEST, adapter_path, sha256_file
from serving.adapters.loader import Loader
from serving.adapters.process import LoaderProcess


@pytest.fixture
def keys(home: Path) -> Keys:
    return Keys(home / "keys" / "signing.pem", own=True)


@pytest.fixture
def foreign(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "foreign" / "signing.pem", own=True)


@pytest.fixture
def signed(write, publish):
    """`signed(keys, seed)` → the digest of an adapter that these keys have signed."""

    def make(keys: Keys, seed: int = 0) -> str:
        keys.sign(directory := write(seed))
        return publish(directory)

    return make


@pytest.fixture
def strict(settings, keys):
    """The loader's settings, trusting `keys` alone."""
    keys.public()
    return replace(settings, requirements=replace(settings.requirements, signature=keys.trust().verify))


def refused(settings, digest: str) -> SignatureInvalid:
    with pytest.raises(SignatureInvalid) as caught:
        Loader(settings).load(digest)
    assert caught.value.context == {"adapter": digest, "check": "signature"}
    return caught.value


def test_a_signed_one_is_loaded_by_the_process_that_got_public_keys_only(strict, keys, signed, write, publish):
    good, unsigned = signed(keys, 1), publish(write(2))
    sent = pickle.dumps(strict)
    assert b"PRIVATE" not in sent
    assert str(keys.private).encode() not in sent
    keys.private.unlink()  # as on a machine that never had it

    async def use() -> None:
        loader = LoaderProcess(pickle.loads(sent))  # noqa: S301 - our own
        try:
            assert (await loader.load(good)).from_store
            assert not (await loader.load(good)).from_store, "from the disk it is checked as well"
            with pytest.raises(SignatureInvalid, match="is not signed") as caught:
                await loader.load(unsigned)
            assert caught.value.context == {"adapter": unsigned, "check": "signature"}
        finally:
            await loader.close()

    asyncio.run(asyncio.wait_for(use(), timeout=120))


def test_unsigned_and_foreign_ones_are_refused(strict, keys, foreign, signed, write, publish):
    assert "adaptory adapters sign" in (refused(strict, publish(write(1))).hint or "")
    theirs = signed(foreign, 2)
    assert "is signed by the key" in refused(strict, theirs).message
    both = Trust((keys.public(), foreign.public()))
    Loader(replace(strict, requirements=replace(strict.requirements, signature=both.verify))).load(theirs)
    nobody = replace(strict, requirements=replace(strict.requirements, signature=Trust(()).verify))
    assert "trusted are none" in refused(nobody, theirs).message


def restate(directory: Path) -> None:
    """Make the manifest fit the files again, as somebody would who can write to the store."""
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    for name, entry in manifest["files"].items():
        entry.update(size=(directory / name).stat().st_size, sha256=sha256_file(directory / name))
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", SIGNATURE_FILE])
def test_a_flipped_byte_is_found_though_the_manifest_was_made_to_fit(strict, keys, signed, store, name: str):
    digest = signed(keys)
    shelf = Path(store.full(adapter_path(digest)))
    data = bytearray((shelf / name).read_bytes())
    data[len(data) // 2] ^= 1
    (shelf / name).write_bytes(data)
    restate(shelf)
    assert refused(strict, digest).hint


def test_another_adapters_signature_does_not_help(strict, keys, signed, write, publish):
    keys.sign(directory := write(1))
    theirs = write(2)
    (theirs / SIGNATURE_FILE).write_bytes((directory / SIGNATURE_FILE).read_bytes())
    assert "is not what was signed" in refused(strict, publish(theirs)).message


def test_one_that_is_signed_later_is_served_then(strict, keys, write, publish, store):
    digest = publish(directory := write(1))
    refused(strict, digest)
    keys.sign(directory)
    store.publish(adapter_path(digest), directory, {})
    Loader(strict).load(digest)
