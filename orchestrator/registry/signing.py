"""Signatures of adapters in OpenSSF model-signing's format: `model.sig` beside the files, written before the manifest.

Who signs: the control plane, never a job. A job runs on machines of the cluster, where a key would be anybody's who can
submit one; it publishes unsigned and names the digest in its result. Who takes that result over (`intake`) fetches what
lies under the digest, proves that it is its digest and that it is a good adapter, and signs it. An import is signed
before it is published.

What a signature covers: the bytes and names of all files but itself and `manifest.json`, which comes after it. What it
does not cover is where the directory lies (a signed adapter can be copied over another's) and what the manifest's
metadata says; so `verification` derives both from the signed files again.

The key is `settings.signing_key`, by default `keys/signing.pem` in the home, made on first use. Machines that only read
need no private key: they name public ones in `settings.trusted_keys`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import KeyUnusable, SignatureInvalid
from orchestrator.store import MANIFEST

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

    from orchestrator.settings import Settings

SIGNATURE_FILE = "model.sig"

_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those that model-signing takes

# Both model_signing (half a second: it brings sigstore's whole client) and cryptography are imported where they are
# used: most commands, and every job, sign nothing.


@dataclass(frozen=True)
class Keys:
    """Where the keys are. They are read, and our own is made, when they are used."""

    private: Path
    """PEM file of the key that signs."""
    own: bool
    """It is the home's own: made on first use, and refused if others can read it."""
    trusted: tuple[Path, ...] = ()
    """PEM files of public keys whose signatures count beside our own."""

    @staticmethod
    def of(settings: Settings) -> Keys:
        private = settings.signing_key or settings.keys / "signing.pem"
        return Keys(private, own=settings.signing_key is None, trusted=settings.trusted_keys)

    def sign(self, directory: Path) -> None:
        """Write `model.sig` over the directory's files.

        Raises:
            KeyUnusable: the key cannot be read or made.
        """
        from model_signing import signing

        self.public()  # explains what is wrong with the key, which the library does not
        config = signing.Config().use_elliptic_key_signer(private_key=self.private)
        config.set_hashing_config(_hashing()).sign(directory, directory / SIGNATURE_FILE)

    def public(self) -> bytes:
        """The public half of the key that signs, as PEM.

        Raises:
            KeyUnusable: the key cannot be read or made.
        """
        if self.own and not self.private.exists():
            _make_key(self.private)
        return _pem(_read_private(self.private, owner_only=self.own).public_key())

    def trust(self) -> Trust:
        """Our own public key, if there is one yet, and the trusted ones.

        Raises:
            KeyUnusable: one of them cannot be read.
        """
        ours = (self.public(),) if self.private.exists() or not self.own else ()
        return Trust(ours + tuple(_read_public(path) for path in self.trusted))


@dataclass(frozen=True)
class Trust:
    """The public keys (PEM) whose signatures count. Pickles, so that it can be sent to an engine's replica."""

    keys: tuple[bytes, ...]

    def verify(self, directory: Path, name: str) -> str:
        """Prove that the directory holds exactly what one of the keys signed; returns that key's fingerprint.

        Args:
            name: of the adapter, for the error.

        Raises:
            SignatureInvalid: not signed, signed by another key, or a file was changed, removed or added since.
        """
        from model_signing import verifying

        signer = _signer(directory / SIGNATURE_FILE, name)
        key = {fingerprint(key): key for key in self.keys}.get(signer)
        if key is None:
            known = ", ".join(fingerprint(key)[:12] for key in self.keys) or "none"
            raise SignatureInvalid(
                f"The adapter {name} is signed by the key {signer[:12]}, and trusted are {known}.",
                hint="If that key is yours, name its public half in ADAPTORY_TRUSTED_KEYS; else do not use the adapter.",
                adapter=name,
                check="signature",
            )
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # the library takes keys by path only
            file.write(key)
            file.flush()
            config = verifying.Config().use_elliptic_key_verifier(public_key=file.name).set_hashing_config(_hashing())
            try:
                config.verify(directory, directory / SIGNATURE_FILE)
            except Exception as error:  # the library lets out what json, base64, cryptography and pydantic raise
                raise SignatureInvalid(
                    f"The adapter {name} is not what was signed: {_said(error)}.",
                    hint="Do not use it; restore it from a backup, import it or train it again.",
                    adapter=name,
                    check="signature",
                ) from error
        return signer


def get_ready() -> None:
    """Import what `Trust.verify` needs, so that the first adapter does not wait for it."""
    import model_signing.verifying  # noqa: F401


def fingerprint(public: bytes) -> str:
    """SHA-256 of the PEM, by which a signature names its key."""
    return hashlib.sha256(public).hexdigest()


# --- details --------------------------------------------------------------------------------------------------------


def _hashing() -> Any:
    from model_signing import hashing

    # By default the library overlooks .gitattributes and the like: files that could be added unseen.
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE, MANIFEST], ignore_git_paths=False)


def _signer(file: Path, name: str) -> str:
    """The fingerprint of the key that a signature says it was made with."""
    try:
        signer = json.loads(file.read_bytes())["verificationMaterial"]["publicKey"]["hint"]
        if not isinstance(signer, str) or not signer:  # without it the library would print a warning, and go on
            raise ValueError("it names no key")
        return signer
    except FileNotFoundError as error:
        raise SignatureInvalid(
            f"The adapter {name} is not signed.",
            hint=f"If it is yours, `adaptory adapters sign {name}` checks and signs it.",
            adapter=name,
            check="signature",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureInvalid(
            f"The signature of the adapter {name} cannot be read ({type(error).__name__}: {error}).",
            hint="Do not use it; restore it from a backup.",
            adapter=name,
            check="signature",
        ) from error


def _said(error: Exception) -> str:
    """The library's words without the digests it prints after a file's name."""
    text = (str(error).strip() or "the signature does not fit its statement").splitlines()[0]
    text = text.replace("\\'", "'")  # the library prints a list of sentences
    return text.partition(": Expected")[0].removeprefix("Signature mismatch: ").lstrip("[\"'").rstrip(']."')


def _make_key(path: Path) -> None:
    """Two processes may do this at once: the first one's key is kept."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)  # with mode 0600
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(pem)
                stream.flush()
                os.fsync(stream.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
                path.with_suffix(".pub").write_bytes(_pem(key.public_key()))  # for the other machines' trusted keys
        finally:
            Path(name).unlink()
    except OSError as error:
        raise KeyUnusable(
            f"No signing key can be made at {path}: {error.strerror}.",
            hint="Give this user write access there, or set ADAPTORY_SIGNING_KEY.",
            path=str(path),
        ) from error


def _read_private(path: Path, *, owner_only: bool) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    data = _read(path)
    if owner_only and path.stat().st_mode & 0o077:
        raise KeyUnusable(
            f"The signing key {path} can be read by others.",
            hint=f"chmod 600 {path}, or make a new one.",
            path=str(path),
        )
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise _no_key(path, "private key without a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise _no_key(path, "private key without a password")
    return key


def _read_public(path: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(_read(path))
    except ValueError as error:
        raise _no_key(path, "public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _no_key(path, "public key")
    return _pem(key)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyUnusable(
            f"The key {path} cannot be read: {error.strerror}.",
            hint="Check ADAPTORY_SIGNING_KEY and ADAPTORY_TRUSTED_KEYS.",
            path=str(path),
        ) from error


def _pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _no_key(path: Path, what: str) -> KeyUnusable:
    return KeyUnusable(
        f"{path} holds no {what} on one of the curves P-256, P-384 and P-521, in PEM.",
        hint="openssl ecparam -name prime256v1 -genkey -noout -out KEY makes one, openssl ec -in KEY -pubout its public half.",
        path=str(path),
    )
