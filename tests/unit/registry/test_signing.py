"""The key and what it signs, also in the eyes of model-signing's own program (4 s, most of it importing that library)."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from orchestrator.errors import KeyUnusable, SettingsError, SignatureInvalid
from orchestrator.registry.signing import SIGNATURE_FILE, Keys, Trust, fingerprint
from orchestrator.settings import load_settings

PLAIN = serialization.NoEncryption()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "weights").write_bytes(bytes(range(256)))
    return path


def write(path: Path, key: object, encryption: serialization.KeySerializationEncryption = PLAIN) -> Path:
    assert hasattr(key, "private_bytes")
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    return path


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_made_on_first_use_for_its_owner_alone(keys: Keys) -> None:
    assert not keys.private.exists()
    assert keys.trust() == Trust(())
    assert not keys.private.exists(), "asking whom to trust makes none"
    public = keys.public()
    assert stat.S_IMODE(keys.private.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.private.parent.stat().st_mode) == 0o700
    assert keys.public() == public
    assert keys.trust() == Trust((public,))
    assert keys.private.with_suffix(".pub").read_bytes() == public
    assert sorted(file.name for file in keys.private.parent.iterdir()) == ["signing.pem", "signing.pub"]


def _public(path: str) -> bytes:
    return Keys(Path(path), own=True).public()


def test_processes_that_make_it_at_once_have_one_key(keys: Keys) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = set(pool.map(_public, [str(keys.private)] * 4, chunksize=1))
    assert found == {keys.private.with_suffix(".pub").read_bytes()}


def test_a_key_that_others_can_read_is_refused(keys: Keys) -> None:
    keys.public()
    keys.private.chmod(0o640)
    with pytest.raises(KeyUnusable, match="can be read by others") as caught:
        keys.public()
    assert "chmod 600" in str(caught.value.hint)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_a_key_by_path(
    curve: ec.EllipticCurve, tmp_path: Path, directory: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "production.pem", ec.generate_private_key(curve))
    path.chmod(0o644)  # as a mounted secret is
    monkeypatch.setenv("ADAPTORY_SIGNING_KEY", str(path))
    keys = Keys.of(load_settings())
    keys.sign(directory)
    assert keys.trust().verify(directory, "x") == fingerprint(keys.public())
    assert not (home / "keys").exists()


def test_keys_that_cannot_sign(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(KeyUnusable, match="cannot be read: No such file"):
        Keys(path, own=False).public()
    locked = serialization.BestAvailableEncryption(b"secret")
    bad: list[Callable[[], object]] = [
        lambda: write(path, ed25519.Ed25519PrivateKey.generate()),
        lambda: write(path, rsa.generate_private_key(65537, 2048)),
        lambda: write(path, ec.generate_private_key(ec.SECP256K1())),
        lambda: write(path, ec.generate_private_key(ec.SECP256R1()), locked),
        lambda: path.write_bytes(b"no key"),
    ]
    for make in bad:
        make()
        with pytest.raises(KeyUnusable, match="holds no private key without a password") as caught:
            Keys(path, own=False).public()
        assert "openssl" in str(caught.value.hint)
    with pytest.raises(KeyUnusable, match="holds no public key"):
        Keys(tmp_path / "none.pem", own=True, trusted=(path,)).trust()


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a file")
    with pytest.raises(KeyUnusable, match="No signing key can be made"):
        Keys(tmp_path / "keys" / "signing.pem", own=True).public()


def test_trusted_keys_of_the_settings(
    tmp_path: Path, directory: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [Keys(tmp_path / name / "signing.pem", own=True) for name in ("one", "two")]
    others[1].sign(directory)
    with pytest.raises(SignatureInvalid, match="trusted are none"):
        Keys.of(load_settings()).trust().verify(directory, "x")
    for other in others:
        other.public()
    monkeypatch.setenv("ADAPTORY_TRUSTED_KEYS", ",".join(str(other.private.with_suffix(".pub")) for other in others))
    trust = Keys.of(load_settings()).trust()
    assert trust.verify(directory, "x") == fingerprint(others[1].public())
    assert pickle.loads(pickle.dumps(trust)) == trust  # noqa: S301  (our own bytes)
    assert not keys.private.exists()
    monkeypatch.setenv("ADAPTORY_MAX_RANK", "0")
    with pytest.raises(SettingsError, match="ADAPTORY_MAX_RANK"):
        load_settings()


# --- signatures -----------------------------------------------------------------------------------------------------


def test_any_change_is_seen(directory: Path, keys: Keys) -> None:
    keys.sign(directory)
    trust = keys.trust()
    trust.verify(directory, "x")
    (directory / "manifest.json").write_text("written after the signature")
    trust.verify(directory, "x")
    signature, weights = directory / SIGNATURE_FILE, directory / "weights"
    data, signed = weights.read_bytes(), signature.read_bytes()

    weights.write_bytes(b"\x01" + data[1:])
    with pytest.raises(SignatureInvalid, match="Hash mismatch for 'weights'"):
        trust.verify(directory, "x")
    weights.write_bytes(data)
    for name in ("more", ".gitattributes", "sub/model.sig"):
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        with pytest.raises(SignatureInvalid, match=rf"Extra files.*{re.escape(name)}"):
            trust.verify(directory, "x")
        file.unlink()
    weights.rename(directory.parent / "weights")
    with pytest.raises(SignatureInvalid, match=r"Missing files.*weights"):
        trust.verify(directory, "x")
    (directory / "weights").symlink_to(directory.parent / "weights")
    with pytest.raises(SignatureInvalid):
        trust.verify(directory, "x")
    (directory / "weights").unlink()
    (directory.parent / "weights").rename(weights)
    trust.verify(directory, "x")

    signature.unlink()
    with pytest.raises(SignatureInvalid, match="is not signed"):
        trust.verify(directory, "x")
    for bad in (b"", b"[]", b"{}", signed[:-40], b"\xff" + signed):
        signature.write_bytes(bad)
        with pytest.raises(SignatureInvalid, match="cannot be read"):
            trust.verify(directory, "x")


def test_a_statement_changed_in_the_signature(directory: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    keys.sign(directory)
    file = directory / SIGNATURE_FILE
    bundle = json.loads(file.read_text())

    def refused(change: Callable[[dict], object], words: str) -> None:
        changed = json.loads(json.dumps(bundle))
        change(changed)
        file.write_text(json.dumps(changed))
        with pytest.raises(SignatureInvalid, match=words):
            keys.trust().verify(directory, "x")

    flipped = {"A": "B", "B": "A"}
    payload = bundle["dsseEnvelope"]["payload"]
    other = payload[:100] + flipped.get(payload[100], "A") + payload[101:]
    refused(lambda b: b["dsseEnvelope"].update(payload=other), "not what was signed")
    refused(lambda b: b["dsseEnvelope"].update(signatures=[]), "not what was signed")
    refused(lambda b: b["verificationMaterial"]["publicKey"].update(hint="0" * 64), "by the key 000000000000")
    refused(lambda b: b["verificationMaterial"]["publicKey"].pop("hint"), "cannot be read")
    assert capsys.readouterr().out == "", "the library prints where a machine reads"


def test_model_signings_own_program_agrees(directory: Path, keys: Keys) -> None:
    """Its defaults, so that anybody can check an adapter without us, in the store as it lies there."""
    keys.sign(directory)
    (directory / "manifest.json").write_text("{}")
    program = [sys.executable, "-m", "model_signing", "verify", "key", str(directory)]
    program += ["--signature", str(directory / SIGNATURE_FILE)]
    program += ["--public_key", str(keys.private.with_suffix(".pub"))]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (directory / "weights").write_bytes(b"other")
    assert subprocess.run(program, capture_output=True, text=True, check=False).returncode != 0
