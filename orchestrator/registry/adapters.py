"""Published adapters: `adapters/<digest>/` in the store, with PEFT's files, provenance and a model card.

The digest names the content, so publishing the same weights again changes nothing. The store is the truth; the database
only remembers. A run of full tuning publishes whole weights in the same place.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from orchestrator.errors import AdapterError, AdapterNotFound, CorruptObject, ObjectMissing
from orchestrator.modeling.adapter_check import check_adapter
from orchestrator.modeling.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_digest,
    raw_tensors,
    read_adapter_config,
)
from orchestrator.modeling.model_files import base_digest as weights_digest
from orchestrator.modeling.model_files import check_directory, tensor_shapes, weight_files
from orchestrator.registry.provenance import PROVENANCE_FILE, Origin, Provenance
from orchestrator.registry.signing import Keys
from orchestrator.runs.result import RunResult
from orchestrator.store import Manifest, Store, adapter_path, result_path, spec_path

log = logging.getLogger(__name__)


class AdapterSummary(Origin):
    """The manifest's metadata: what a list shows, read without fetching weights."""

    kind: Literal["lora", "full"]
    """`full`: whole weights of a run of full tuning."""
    digest: str
    base_model: str
    base_digest: str
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    targets: list[str] = Field(default_factory=list)
    dtype: str
    """Of the stored weights: `F32`, `BF16`; several are joined by a comma."""
    parameters: int
    size: int
    """Bytes of the weights."""
    evaluation: dict[str, float] = Field(default_factory=dict)
    """On held-out rows, after training."""


# --- publish --------------------------------------------------------------------------------------------------------


def publish_adapter(
    store: Store,
    directory: Path,
    base_digest: str,
    provenance: Provenance,
    *,
    base: Path | None = None,
    keys: Keys | None = None,
) -> str:
    """Check and publish a LoRA adapter; returns its digest (`sha256:…`). Publishing it again changes nothing.

    Args:
        directory: `adapter_config.json` and `adapter_model.safetensors`.
        base: the base model's directory, to check the shapes against.
        keys: sign it; a job has none, and what it publishes is signed when its result is taken over.

    Raises:
        AdapterError: damaged, not finite, without effect, or not of this base: nothing is published.
    """
    check_adapter(directory, base)
    digest = adapter_digest(directory, base_digest)
    summary = lora_summary(directory, digest, provenance)
    return _publish(store, directory, [CONFIG_FILE, WEIGHTS_FILE], summary, provenance, keys)


def publish_weights(store: Store, directory: Path, provenance: Provenance) -> str:
    """Check and publish the whole weights of a run of full tuning; returns their digest, which is that of a base model.

    Raises:
        ModelError: the directory is no complete model.
    """
    check_directory(directory, str(directory))
    digest = weights_digest(directory, str(directory), None)
    ours = (PROVENANCE_FILE, "README.md")
    names = [file.name for file in sorted(directory.iterdir()) if file.is_file() and file.name not in ours]
    return _publish(store, directory, names, full_summary(directory, digest, provenance), provenance, None)


def _publish(
    store: Store,
    directory: Path,
    names: list[str],
    summary: AdapterSummary,
    provenance: Provenance,
    keys: Keys | None,
) -> str:
    prefix = adapter_path(summary.digest)
    if store.manifest(prefix) is not None:
        return summary.digest
    with tempfile.TemporaryDirectory(prefix="adaptory-publish-", dir=directory.parent) as temporary:
        staged = Path(temporary)
        for name in names:
            _link_or_copy(directory / name, staged / name)
        (staged / PROVENANCE_FILE).write_text(provenance.model_dump_json(indent=2) + "\n")
        (staged / "README.md").write_text(model_card(summary, provenance))
        if keys is not None:
            keys.sign(staged)
        store.publish(prefix, staged, summary.model_dump(mode="json"))
    return summary.digest


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def lora_summary(directory: Path, digest: str, provenance: Provenance) -> AdapterSummary:
    config, tensors = read_adapter_config(directory), raw_tensors(directory)
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    return AdapterSummary(
        kind="lora",
        digest=digest,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        targets=targets,
        dtype=", ".join(sorted({tensor.dtype for tensor in tensors.values()})),
        parameters=sum(_product(tensor.shape) for tensor in tensors.values()),
        size=(directory / WEIGHTS_FILE).stat().st_size,
        **_origin(provenance),
    )


def full_summary(directory: Path, digest: str, provenance: Provenance) -> AdapterSummary:
    files = weight_files(directory, str(directory))
    shapes = [shape for file in files for shape in tensor_shapes(file, str(directory)).values()]
    config = json.loads((directory / "config.json").read_bytes())
    return AdapterSummary(
        kind="full",
        digest=digest,
        dtype=str(config.get("dtype") or config.get("torch_dtype")),
        parameters=sum(map(_product, shapes)),
        size=sum(file.stat().st_size for file in files),
        **_origin(provenance),
    )


def _origin(provenance: Provenance) -> dict[str, Any]:
    return provenance.model_dump(include=set(Origin.model_fields)) | {
        "base_model": provenance.base_model.reference,
        "base_digest": provenance.base_model.digest,
        "evaluation": provenance.evaluation.after if provenance.evaluation else {},
    }


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def model_card(summary: AdapterSummary, provenance: Provenance) -> str:
    """The README.md that a model hub shows."""
    hub = provenance.base_model.loadable_name
    head = ["library_name: " + ("peft" if summary.kind == "lora" else "transformers")]
    head += [f"base_model: {hub}"] if hub and not hub.startswith("/") else []
    what = f"LoRA, rank {summary.rank}, alpha {summary.alpha:g}" if summary.kind == "lora" else "all weights"
    made = "Fine-tuned by Adaptory from" if summary.run else "Trained elsewhere, imported as an adapter of"
    lines = ["---", *head, "---", f"# {summary.name}", "", f"{made} {summary.base_model}: {what}."]
    lines += ["", f"- digest `{summary.digest}`", f"- base `{summary.base_digest}`"]
    if summary.run:
        lines += [f"- run `{summary.run}`, attempt {summary.attempt}, step {summary.step}, seed {provenance.seed}"]
    lines += [f"- {name}: {value:.4g}" for name, value in (summary.evaluation or summary.metrics).items()]
    return "\n".join([*lines, "", f"How it was made is in `{PROVENANCE_FILE}`.", ""])


# --- read -----------------------------------------------------------------------------------------------------------


def list_adapters(store: Store, *, tenant: str | None = None) -> list[AdapterSummary]:
    """Everything published, newest first; what was never completed does not exist."""
    found = []
    for name in store.children("adapters"):
        try:
            if (manifest := store.manifest(f"adapters/{name}")) is not None:
                found.append(_summary(manifest, name))
        except (AdapterError, CorruptObject) as error:
            log.warning("%s", error)  # one bad manifest must not hide the others; `verify` names what is wrong
    return sorted((s for s in found if tenant in (None, s.tenant)), key=lambda s: s.created_at, reverse=True)


def get_adapter(store: Store, digest: str) -> AdapterSummary:
    """
    Raises:
        AdapterNotFound: nothing complete is published under this digest.
        AdapterError: its manifest says something else.
    """
    manifest = store.manifest(adapter_path(digest))
    if manifest is None:
        raise AdapterNotFound(
            f"The store {store.url} has no adapter {digest}.",
            hint="`adaptory adapters list` shows all.",
            adapter=digest,
        )
    return _summary(manifest, digest)


def read_provenance(store: Store, digest: str) -> Provenance:
    """
    Raises:
        AdapterError: it is missing or cannot be understood.
    """
    try:
        return Provenance.model_validate_json(store.read(f"{adapter_path(digest)}/{PROVENANCE_FILE}"))
    except (ObjectMissing, ValidationError) as error:
        raise AdapterError(
            f"The provenance of {digest} cannot be read: {str(error).splitlines()[0]}",
            hint="`adaptory adapters verify` says what else is wrong.",
            adapter=digest,
            check="provenance",
        ) from error


def _summary(manifest: Manifest, digest: str) -> AdapterSummary:
    try:
        return AdapterSummary.model_validate(manifest.metadata)
    except ValidationError as error:
        raise AdapterError(
            f"The manifest of adapter {digest} says nothing usable about it ({error.error_count()} fields).",
            hint="It was written by another program or changed.",
            adapter=digest,
            check="manifest",
        ) from error


# --- references -----------------------------------------------------------------------------------------------------


def resolve_adapter(store: Store, reference: str, *, tenant: str | None = None) -> str:
    """The digest that a person's reference means.

    Args:
        reference: `sha256:…`, the first 6 or more digits of a digest, a run id, a run's name, or `tenant/name`.

    Raises:
        AdapterNotFound: it names nothing, or more than one thing.
    """
    prefix = reference.removeprefix("sha256:")
    if re.fullmatch(r"[0-9a-f]{6,64}", prefix):
        found = [name for name in store.children("adapters") if name.startswith(prefix)]
        found = [name for name in found if store.manifest(f"adapters/{name}") is not None]
        if len(found) == 1:
            return f"sha256:{found[0]}"
        if len(found) > 1:
            raise _ambiguous(reference, [name[: len(prefix) + 6] for name in found])
    owner, _, name = reference.rpartition("/")
    if found_run := _of_run(store, name, owner or tenant):
        return found_run
    raise _unknown(store, reference)


def _of_run(store: Store, name: str, tenant: str | None) -> str | None:
    """By run id, else the newest adapter among the runs of this name."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        return None
    runs = store.children("runs")
    if name in runs:
        result = _result(store, name)
        return result.adapter if result else None
    ids = [run for run in runs if re.fullmatch(re.escape(name) + r"-[a-z0-9]{6}", run)]
    # A run of another name may look alike (`a-finance` is no id of run `a`), so its spec decides.
    owners: dict[str, tuple[float, str]] = {}
    for run in ids:
        result, spec = _result(store, run), store.read_json(spec_path(run))["spec"]
        if result and result.adapter and spec["name"] == name and tenant in (None, spec["tenant"]):
            owners[spec["tenant"]] = max(owners.get(spec["tenant"], (0.0, "")), (result.finished_at, result.adapter))
    if len(owners) > 1:
        raise _ambiguous(name, [f"{owner}/{name}" for owner in sorted(owners)])
    return next(iter(owners.values()))[1] if owners else None


def _result(store: Store, run: str) -> RunResult | None:
    try:
        return RunResult.model_validate_json(store.read(result_path(run)))
    except ObjectMissing:
        return None


def _ambiguous(reference: str, found: list[str]) -> AdapterNotFound:
    return AdapterNotFound(
        f"{reference!r} names {len(found)} adapters: {', '.join(found[:5])}.",
        hint="Write one of them.",
        adapter=reference,
    )


def _unknown(store: Store, reference: str) -> AdapterNotFound:
    known = list_adapters(store)
    names = {s.name for s in known} | {s.run for s in known if s.run}
    near = difflib.get_close_matches(reference, sorted(names), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else "" if known else "Nothing has been published yet. "
    return AdapterNotFound(
        f"The store {store.url} has no adapter {reference!r}: no digest begins so, and no run of that name published one.",
        hint=f"{hint}`adaptory adapters list` shows all.",
        adapter=reference,
    )
