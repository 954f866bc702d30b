"""Adapters that were trained elsewhere: a PEFT directory becomes the next version of a tenant's name.

Nothing is kept of a directory that is refused: what is admitted is copied aside first, checked there, signed, published
with its manifest last, and only then registered. A repetition after a kill finds what is there already.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.db import Database
from orchestrator.db.inserts import insert_or_ignore
from orchestrator.db.models import AdapterRow
from orchestrator.errors import AdapterError
from orchestrator.modeling.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_digest,
    raw_tensors,
    read_adapter_config,
)
from orchestrator.modeling.base_model import known_base, materialize
from orchestrator.modeling.model_files import read_config
from orchestrator.registry import versions
from orchestrator.registry.adapters import AdapterSummary, lora_summary, publish_adapter
from orchestrator.registry.intake import publishing_alone
from orchestrator.registry.provenance import BaseModelRecord, ImportRecord, Provenance
from orchestrator.registry.signing import Keys
from orchestrator.registry.verification import sign_published
from orchestrator.registry.versions import AdapterVersion, Reference
from orchestrator.store import Store, base_path


def import_adapter(
    db: Database,
    store: Store,
    directory: Path,
    name: Reference,
    *,
    keys: Keys,
    actor: str,
    cache: Path,
    max_rank: int,
    base: str | None = None,
    base_digest: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> AdapterVersion:
    """Check, sign, publish and register an adapter; equal weights under the same name are the version they were.

    Args:
        name: without a selector; a version's number is given, not chosen.
        base: reference of the base model it was trained on; None: the one that its configuration names, unless a digest is
            given.
        base_digest: what the base must be. Alone, the base need not be had: shapes are then checked against it only if it
            is on this machine or in the store.

    Raises:
        AdapterError: refused; `check` says why: `name`, `config`, `weights` (no safetensors), `rank`, `base`, `names`
            (targets that the base lacks, or tensors that no target covers), `shape`, `finite` or `effect`.
        ModelError, PackageError: the base cannot be had.
    """
    if name.selector:
        raise AdapterError(
            f"An import gets the next version of {name.tenant}/{name.name}; {name} names one.",
            hint=f"Write --as {name.tenant}/{name.name}.",
            adapter=str(name),
            check="name",
        )
    with tempfile.TemporaryDirectory(prefix="adaptory-import-") as temporary:
        files = Path(temporary) / "adapter"
        _copy(directory, files)
        _check_rank(files, max_rank)
        record, path = _base(files, directory, store, base, base_digest, cache, say)
        digest = adapter_digest(files, record.digest)
        provenance = Provenance(
            tenant=name.tenant,
            name=name.name,
            created_at=time.time(),
            base_model=record,
            imported=ImportRecord(source=str(directory), by=actor),
        )
        with publishing_alone(db, digest):
            publish_adapter(store, files, record.digest, provenance, base=path, keys=keys)
            sign_published(store, digest, keys, base=path)  # one that a job has published before is not signed yet
        summary = lora_summary(files, digest, provenance)
    with db.write() as session:
        version = versions.register(session, name.tenant, name.name, digest, actor=actor)
        session.execute(insert_or_ignore(session, AdapterRow).values(**_row(summary, provenance)))
        return version


def _row(summary: AdapterSummary, provenance: Provenance) -> dict[str, Any]:
    """What the database remembers of it; of equal weights that a run of this tenant's published, it does already."""
    return {
        **summary.model_dump(include={"tenant", "digest", "name", "base_digest", "rank", "created_at"}),
        "metrics": {},
        "provenance": provenance.model_dump(mode="json") | summary.model_dump(mode="json"),
    }


def _copy(directory: Path, files: Path) -> None:
    """The two files that matter, so that what is checked is what is published, whoever writes to the directory meanwhile."""
    read_adapter_config(directory)  # says what is missing or is no plain LoRA
    raw_tensors(directory)
    files.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(directory / name, files / name)


def _check_rank(files: Path, max_rank: int) -> None:
    config = read_adapter_config(files)
    rank = max([config.rank, *config.rank_pattern.values()])
    if not 0 < rank <= max_rank:
        raise AdapterError(
            f"The adapter has rank {rank}; 1 to {max_rank} are admitted.",
            hint="Raise ADAPTORY_MAX_RANK if the engine has the memory for it.",
            rank=rank,
            check="rank",
        )


def _base(
    files: Path,
    directory: Path,
    store: Store,
    reference: str | None,
    digest: str | None,
    cache: Path,
    say: Callable[[str], None],
) -> tuple[BaseModelRecord, Path | None]:
    """The base an adapter belongs to, and its directory if it can be had."""
    named = reference or read_adapter_config(files).base_model
    if reference is None and digest is not None:
        path = known_base(digest, cache)
        if path is None and store.manifest(base_path(digest)) is not None:
            path = materialize(f"store:{base_path(digest)}", cache=cache, store=store, say=say).path
        if path is None:
            say(f"Note: the base {digest[:19]}… is not here, so that it fits was checked by its own shapes alone.")
        kind = str(read_config(path, digest).get("model_type")) if path else "unknown"
        return BaseModelRecord(reference=named or digest, digest=digest, model_type=kind), path
    if named is None:
        raise AdapterError(
            f"{directory / CONFIG_FILE} names no base model.",
            hint="Name the one it was trained on with --base.",
            adapter=str(directory),
            check="base",
        )
    found = materialize(named, cache=cache, store=store, say=say)
    if digest is not None and found.digest != digest:
        raise AdapterError(
            f"The base {named} has digest {found.digest}, not {digest}.",
            hint="Find the weights that the adapter was trained on: others give other answers.",
            adapter=str(directory),
            check="base",
        )
    hub = found.loadable_name if found.source == "hub" else None
    record = BaseModelRecord(reference=named, digest=found.digest, model_type=found.model_type, loadable_name=hub)
    return record, found.path
