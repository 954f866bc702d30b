"""Take an adapter out of the store: as a PEFT directory, or merged into full weights."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from orchestrator.errors import AdapterError, AdaptoryError, OutputError, UsageError
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
        AdapterError: no such adapter, or the base is not the one it was trained on.
        UsageError: `out` is taken, or a dtype was given without merging.
        OutputError: `out` cannot be written.
        CorruptObject, SignatureInvalid: it is not what was published and signed.
        ModelError, PackageError: the base cannot be had (merging only).
    """
    say = say or (lambda _: None)
    summary = get_adapter(store, digest)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory.", hint="Name another --out, or remove it.")
    if dtype and not (merged and summary.kind == "lora"):
        raise UsageError("A dtype can only be chosen when merging.", hint="Add --merged, or leave --dtype out.")
    with _beside(out) as partial:
        adapter = partial / "adapter"
        fetched = fetch_verified(store, digest, adapter, trust)
        (adapter / SIGNATURE_FILE).unlink()
        if fetched.summary.kind == "lora" and merged:
            base = find_base(store, fetched.summary, cache=cache, say=say)
            _merge(adapter, base, partial / "merged", dtype).replace(out)
            return out
        if fetched.summary.kind == "lora":
            _name_the_base(adapter, store, fetched, cache, say)
        adapter.replace(out)
    return out


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A directory next to `out` to make it in. Whatever happens it is gone afterwards, and so are the directories above
    that were made for an `out` that did not come about.

    Raises:
        OutputError: the disk is full, read-only, or takes no directory there.
    """
    partial = out.parent / f".tmp-{uuid.uuid4().hex}"
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError, OutputError) as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in () if out.exists() else missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _unwritable(out: Path, error: Exception) -> OutputError:
    cause = error.__cause__ if isinstance(error, OutputError) else error
    why = getattr(cause, "strerror", None) or cause  # safetensors words the disk's answer itself
    hint = "Name another --out, or make room or allow it there."
    return OutputError(f"--out {out} cannot be written: {why}.", hint=hint, file=str(out))


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


def _merge(adapter: Path, base: Path, out: Path, dtype: str | None) -> Path:
    from orchestrator.modeling.merge import merge

    merge(base, adapter, out, dtype)
    shutil.copyfile(adapter / PROVENANCE_FILE, out / PROVENANCE_FILE)
    return out


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
