"""Take an adapter out of the store: as a PEFT directory, or merged into full weights."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import AdapterError, AdaptoryError
from orchestrator.modeling.adapter_files import CONFIG_FILE
from orchestrator.modeling.base_model import known_base, materialize
from orchestrator.registry.adapters import AdapterSummary, get_adapter
from orchestrator.registry.provenance import PROVENANCE_FILE
from orchestrator.registry.signing import SIGNATURE_FILE, Trust
from orchestrator.registry.verification import Fetched, fetch_verified
from orchestrator.store import Store, base_path


def export_adapter(
    store: Store,
    digest: str,
    out: Path,
    *,
    cache: Path,
    trust: Trust,
    merged: bool = False,
    dtype: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write the adapter to `out`, which appears when it is complete; returns it. The signature stays behind: what is
    written names its base as this machine knows it, and so differs from what was signed.

    Args:
        merged: full weights that plain transformers loads, instead of PEFT's files.
        dtype: of merged weights, `bfloat16` or `float32`; None: as in the base.
        say: is told of what takes long, and of a base that cannot be had.

    Raises:
        AdapterError: no such adapter, `out` is taken, or the base is not the one it was trained on.
        CorruptObject, SignatureInvalid: it is not what was published and signed.
        ModelError, PackageError: the base cannot be had (merging only).
    """
    say = say or (lambda _: None)
    summary = get_adapter(store, digest)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} exists and is not an empty directory.", hint="Name another --out, or remove it.")
    if dtype and not (merged and summary.kind == "lora"):
        raise AdapterError("A dtype can only be chosen when merging.", hint="Add --merged, or leave --dtype out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        fetched = fetch_verified(store, digest, partial, trust)
        summary = fetched.summary
        (partial / SIGNATURE_FILE).unlink()
        if summary.kind == "lora" and merged:
            _merge(partial, find_base(store, summary, cache=cache, say=say), out, dtype)
            return out
        if summary.kind == "lora":
            _name_the_base(partial, store, fetched, cache, say)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def find_base(store: Store, summary: AdapterSummary, *, cache: Path, say: Callable[[str], None]) -> Path:
    """The base an adapter was trained on, with the digest it had then: on this machine, in the store, or by its name.

    Raises:
        AdapterError: what its name now leads to has other weights.
        ModelError, PackageError: it cannot be had.
    """
    if here := known_base(summary.base_digest, cache):
        return here
    kept = base_path(summary.base_digest)
    reference = f"store:{kept}" if store.manifest(kept) is not None else summary.base_model
    base = materialize(reference, cache=cache, store=store, say=say)
    if base.digest != summary.base_digest:
        raise AdapterError(
            f"{reference} now has digest {base.digest[:19]}…, and the adapter belongs to {summary.base_digest[:19]}….",
            hint="Find the base model as it was (its revision, its file): other weights give other answers.",
            adapter=summary.digest,
            check="base",
        )
    return base.path


def _merge(adapter: Path, base: Path, out: Path, dtype: str | None) -> None:
    from orchestrator.modeling.merge import merge

    merge(base, adapter, out, dtype)
    shutil.copyfile(adapter / PROVENANCE_FILE, out / PROVENANCE_FILE)


def _name_the_base(directory: Path, store: Store, fetched: Fetched, cache: Path, say: Callable[[str], None]) -> None:
    """Make `base_model_name_or_path` something that loads here: a hub id, else this machine's directory."""
    file, name = directory / CONFIG_FILE, fetched.provenance.base_model.loadable_name
    if name is None or Path(name).is_absolute():  # of the machine that trained it
        try:
            name = str(find_base(store, fetched.summary, cache=cache, say=say))
        except AdaptoryError as error:
            say(f"Note: the base model is not here, so {CONFIG_FILE} names it as the run did. {error.message}")
            return
    config = json.loads(file.read_bytes()) | {"base_model_name_or_path": name}
    file.write_text(json.dumps(config, indent=2) + "\n")
