"""Whether a published adapter still is what was published: its signature, every byte, every number, and its name.

`verify` finds everything that is wrong, for a person. `fetch_verified` is what every load goes through: it raises at the
first thing, and leaves out the checks of numbers, which were made before the adapter was signed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from orchestrator.errors import (
    AdapterError,
    AdapterNotFound,
    AdaptoryError,
    CorruptObject,
    ObjectMissing,
    SignatureInvalid,
)
from orchestrator.modeling.adapter_check import Check, adapter_problems
from orchestrator.modeling.adapter_files import adapter_digest
from orchestrator.modeling.model_files import base_digest as weights_digest
from orchestrator.modeling.model_files import check_directory
from orchestrator.registry.adapters import AdapterSummary, full_summary, lora_summary
from orchestrator.registry.provenance import PROVENANCE_FILE, Provenance
from orchestrator.registry.signing import SIGNATURE_FILE, Keys, Trust, fingerprint
from orchestrator.store import MANIFEST, Manifest, Store, adapter_path

_TITLES: dict[Check, str] = {
    "names": "modules",
    "shape": "shapes",
    "finite": "numbers are finite",
    "magnitude": "size of the update",
    "effect": "has an effect",
}


class Finding(BaseModel):
    check: str
    ok: bool
    detail: str


class Verification(BaseModel):
    digest: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def require(self) -> None:
        """
        Raises:
            SignatureInvalid: the first finding that failed is the signature.
            AdapterError: with the first finding that failed.
        """
        if bad := [finding for finding in self.findings if not finding.ok]:
            kind = SignatureInvalid if bad[0].check == "signature" else AdapterError
            raise kind(
                f"The adapter {self.digest} is not what was published: {bad[0].detail}",
                hint="If it was published before adapters were signed, or by a key that was replaced, `adaptory adapters sign` "
                "checks and signs it; else do not use it."
                if kind is SignatureInvalid
                else "Do not use it; train it again or restore it from a backup.",
                adapter=self.digest,
                check=bad[0].check,
            )


@dataclass(frozen=True)
class Fetched:
    """A verified adapter on this machine's disk. Summary and provenance are told by its signed files."""

    directory: Path
    summary: AdapterSummary
    provenance: Provenance
    signer: str
    """Fingerprint of the key that signed it."""


def fetch_verified(store: Store, digest: str, directory: Path, trust: Trust) -> Fetched:
    """Copy an adapter to `directory`, proving its bytes, signature and name.

    Raises:
        AdapterNotFound: nothing complete is published under this digest.
        CorruptObject: a file has other bytes than its manifest says.
        SignatureInvalid: not signed, by a key that is not trusted, or a file was changed, removed or added since.
        AdapterError: a signed adapter under another's name, or its provenance or manifest says something else.
    """
    manifest = _fetch(store, digest, directory)
    _refuse_strangers(store, digest, manifest)
    signer = trust.verify(directory, digest)
    provenance = _provenance(directory, digest)
    findings, summary = _content(directory, digest, provenance, manifest)
    Verification(digest=digest, findings=findings).require()
    assert summary is not None  # said by the findings otherwise
    return Fetched(directory, summary, provenance, signer)


def sign_published(store: Store, digest: str, keys: Keys, *, base: Path | None = None) -> bool:
    """Check all of a published adapter and sign it, if it is not signed by this key already; returns whether it was done.

    Only one process at a time may do this for one adapter (`intake` sees to it): two signatures of the same files differ.

    Raises:
        AdapterNotFound: nothing complete is published under this digest.
        CorruptObject: a file has other bytes than its manifest says.
        SignatureInvalid: it is signed by a key that is not trusted, or was changed since. It is left as it is.
        AdapterError: it is not what its name says, or no good adapter.
    """
    prefix = adapter_path(digest)
    with tempfile.TemporaryDirectory(prefix="adaptory-sign-") as temporary:
        directory = Path(temporary)
        manifest = _fetch(store, digest, directory)
        _refuse_strangers(store, digest, manifest)
        if SIGNATURE_FILE in manifest.files:
            signer = keys.trust().verify(directory, digest)
            if signer == fingerprint(keys.public()):
                return False
        Verification(digest=digest, findings=_findings(directory, digest, manifest, base)).require()
        keys.sign(directory)
        store.add(prefix, directory / SIGNATURE_FILE)
    return True


def verify(store: Store, digest: str, *, trust: Trust, base: Path | None = None) -> Verification:
    """Fetch an adapter and check all of it; what is wrong is found, not raised.

    Args:
        base: the base model's directory, to check shapes against; without it they are checked against each other.

    Raises:
        AdapterNotFound: nothing complete is published under this digest.
        StoreError: the store cannot be read.
    """
    digest = digest if ":" in digest else f"sha256:{digest}"
    with tempfile.TemporaryDirectory(prefix="adaptory-verify-") as temporary:
        directory = Path(temporary)
        try:
            manifest = _fetch(store, digest, directory)
            _refuse_strangers(store, digest, manifest)
        except (CorruptObject, ObjectMissing, SignatureInvalid) as error:
            return Verification(digest=digest, findings=[Finding(check="bytes", ok=False, detail=error.message)])
        size = sum(entry.size for entry in manifest.files.values())
        findings = [Finding(check="bytes", ok=True, detail=f"{len(manifest.files)} files, {size:,} bytes")]
        try:
            signer = trust.verify(directory, digest)
            findings.append(Finding(check="signature", ok=True, detail=f"by the key {signer[:12]}"))
        except SignatureInvalid as error:
            findings.append(Finding(check="signature", ok=False, detail=error.message))
        return Verification(digest=digest, findings=findings + _findings(directory, digest, manifest, base))


# --- details --------------------------------------------------------------------------------------------------------


def _fetch(store: Store, digest: str, directory: Path) -> Manifest:
    try:
        return store.fetch(adapter_path(digest), directory)
    except ObjectMissing as error:
        if store.manifest(adapter_path(digest)) is not None:
            raise
        raise AdapterNotFound(
            f"The store {store.url} has no adapter {digest}.",
            hint="`adaptory adapters list` shows all.",
            adapter=digest,
        ) from error


def _refuse_strangers(store: Store, digest: str, manifest: Manifest) -> None:
    """A file beside the others that the manifest does not name. A signature alone is one that is being written just now."""
    prefix = adapter_path(digest)
    found = {path.removeprefix(f"{prefix}/") for path in store.list(prefix)}
    if added := sorted(found - manifest.files.keys() - {MANIFEST, SIGNATURE_FILE}):
        raise SignatureInvalid(
            f"The adapter {digest} holds {', '.join(added[:3])}, which was not published with it.",
            hint=f"Find out who put it into {store.url}/{prefix}; remove it if it is harmless.",
            adapter=digest,
            check="signature",
        )


def _provenance(directory: Path, digest: str) -> Provenance:
    try:
        return Provenance.model_validate_json((directory / PROVENANCE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"The provenance of {digest} cannot be read: {str(error).splitlines()[0]}",
            hint="Do not use the adapter; restore it from a backup.",
            adapter=digest,
            check="provenance",
        ) from error


def _findings(directory: Path, digest: str, manifest: Manifest, base: Path | None) -> list[Finding]:
    """Everything but bytes and signature."""
    try:
        provenance = _provenance(directory, digest)
    except AdapterError as error:
        return [Finding(check="provenance", ok=False, detail=error.message)]
    try:
        numbers = _whole(directory) if _is_whole(manifest) else _lora(directory, base)
    except AdaptoryError as error:
        return [Finding(check="weights", ok=False, detail=error.message)]
    return numbers + _content(directory, digest, provenance, manifest)[0]


def _content(
    directory: Path, digest: str, provenance: Provenance, manifest: Manifest
) -> tuple[list[Finding], AdapterSummary | None]:
    """Name and description, derived from the files again."""
    whole = _is_whole(manifest)
    try:
        found = (
            weights_digest(directory, digest, None)
            if whole
            else adapter_digest(directory, provenance.base_model.digest)
        )
        summary = (full_summary if whole else lora_summary)(directory, digest, provenance)
    except AdaptoryError as error:
        return [Finding(check="weights", ok=False, detail=error.message)], None
    return [_same("digest", found, digest), _as_described(summary, manifest.metadata)], summary


def _is_whole(manifest: Manifest) -> bool:
    return manifest.metadata.get("kind") == "full"


def _lora(directory: Path, base: Path | None) -> list[Finding]:
    problems = adapter_problems(directory, base)
    against = "against the base" if base else "against each other; the base is not on this machine"
    findings = []
    for check, title in _TITLES.items():
        wrong = [problem.message for problem in problems if problem.check == check]
        right = against if check == "shape" else "yes"
        findings.append(Finding(check=title, ok=not wrong, detail="; ".join(wrong[:3]) or right))
    return findings


def _whole(directory: Path) -> list[Finding]:
    check_directory(directory, str(directory))
    return [Finding(check="weights", ok=True, detail="complete")]


def _same(check: str, found: str, expected: str) -> Finding:
    detail = found if found == expected else f"is {found}, and it is published as {expected}"
    return Finding(check=check, ok=found == expected, detail=detail)


def _as_described(summary: AdapterSummary, metadata: dict[str, object]) -> Finding:
    """The manifest's metadata is what lists show: it must follow from weights and provenance."""
    expected = summary.model_dump(mode="json")
    wrong = sorted(key for key in expected if metadata.get(key) != expected[key])
    if wrong:
        return Finding(check="provenance", ok=False, detail=f"the manifest states another {', '.join(wrong)}")
    made = f"run {summary.run}, step {summary.step}" if summary.run else "imported"
    return Finding(check="provenance", ok=True, detail=made)
