"""Whether a published adapter still is what was published: every byte, every number, and its name."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import BaseModel

from orchestrator.errors import AdapterError, AdaptoryError, CorruptObject, ObjectMissing
from orchestrator.modeling.adapter_check import Check, adapter_problems
from orchestrator.modeling.adapter_files import adapter_digest
from orchestrator.modeling.model_files import base_digest as weights_digest
from orchestrator.modeling.model_files import check_directory
from orchestrator.registry.adapters import AdapterSummary, full_summary, lora_summary
from orchestrator.registry.provenance import PROVENANCE_FILE, Provenance
from orchestrator.store import Store, adapter_path

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
            AdapterError: with the first finding that failed.
        """
        if bad := [finding for finding in self.findings if not finding.ok]:
            raise AdapterError(
                f"The adapter {self.digest} is not what was published: {bad[0].detail}",
                hint="Do not use it; train it again or restore it from a backup.",
                adapter=self.digest,
                check=bad[0].check,
            )


def verify(store: Store, digest: str, *, base: Path | None = None) -> Verification:
    """Fetch an adapter and check all of it; what is wrong is found, not raised.

    Args:
        base: the base model's directory, to check shapes against; without it they are checked against each other.

    Raises:
        ObjectMissing: nothing complete is published under this digest.
        StoreError: the store cannot be read.
    """
    digest = digest if ":" in digest else f"sha256:{digest}"
    with tempfile.TemporaryDirectory(prefix="adaptory-verify-") as temporary:
        directory, findings = Path(temporary), []
        try:
            manifest = store.fetch(adapter_path(digest), directory)
        except (CorruptObject, ObjectMissing) as error:
            if isinstance(error, ObjectMissing) and store.manifest(adapter_path(digest)) is None:
                raise
            return Verification(digest=digest, findings=[Finding(check="bytes", ok=False, detail=error.message)])
        size = sum(entry.size for entry in manifest.files.values())
        findings.append(Finding(check="bytes", ok=True, detail=f"{len(manifest.files)} files, {size:,} bytes"))
        try:
            provenance = Provenance.model_validate_json((directory / PROVENANCE_FILE).read_bytes())
        except (OSError, ValueError) as error:
            findings.append(Finding(check="provenance", ok=False, detail=f"cannot be read: {error}"))
            return Verification(digest=digest, findings=findings)
        whole = manifest.metadata.get("kind") == "full"
        try:
            findings += _whole(directory) if whole else _lora(directory, base)
            found = (
                weights_digest(directory, digest, None)
                if whole
                else adapter_digest(directory, provenance.base_model.digest)
            )
            findings.append(_same("digest", found, digest))
            summary = (full_summary if whole else lora_summary)(directory, digest, provenance)
        except AdaptoryError as error:
            findings.append(Finding(check="weights", ok=False, detail=error.message))
        else:
            findings.append(_as_described(summary, manifest.metadata))
    return Verification(digest=digest, findings=findings)


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
    detail = f"the manifest states another {', '.join(wrong)}" if wrong else f"run {summary.run}, step {summary.step}"
    return Finding(check="provenance", ok=not wrong, detail=detail)
