"""Where rows come from: files, globs and directories, `s3://…`, `hf:NAME[:CONFIG][:SPLIT]` and `example:NAME/SPLIT`."""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from jobs.data.catalogue import example_identity, example_rows
from jobs.data.files import Row, Where, file_rows, file_type, known_type
from orchestrator.errors import CorruptObject, DataError
from orchestrator.spec.resolved import DataSource, StoredFile
from orchestrator.store import Store, file_path, sha256_file

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_S3_LIBRARIES = ("botocore", "aiobotocore", "aiohttp")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")


def is_remote(reference: str) -> bool:
    """Whether the job itself reads this reference, wherever it runs."""
    return reference.startswith(("s3://", "hf:", "example:"))


# --- local ----------------------------------------------------------------------------------------------------------


def local_files(reference: str, base_dir: Path) -> list[Path]:
    """Files named by a path, a glob, or a directory (everything readable below it), sorted.

    Raises:
        DataError: nothing is there, it cannot be looked at, or a file is of a type that is not read.
    """
    if not reference.strip():
        raise DataError("A path of the data is empty.", hint="Name a file, a directory or a glob.", value=reference)
    if scheme := _SCHEME.match(reference):
        raise DataError(
            f"{reference} cannot be read: {scheme[0]} is none of the places that data comes from.",
            hint="These are read: a path or glob, s3://BUCKET/KEY, hf:NAME and example:NAME/SPLIT. Download it, or copy it "
            "there.",
            file=reference,
        )
    with _explained(reference):
        return _local_files(reference, base_dir)


def _local_files(reference: str, base_dir: Path) -> list[Path]:
    path = base_dir / Path(reference).expanduser()
    if path.is_dir():
        hidden = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = sorted(p for p in hidden if p.is_file() and known_type(p.name))
        if not found:
            raise DataError(
                f"The directory {reference} holds no data file.",
                hint="Put .jsonl, .json, .csv or .parquet files there, or name another directory.",
                file=reference,
            )
        return found
    if path.is_file():
        file_type(path.name)
        return [path]
    if glob.has_magic(reference):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
        found = sorted(p for p in map(Path, matches) if p.is_file())
        if not found:
            raise DataError(
                f"No file matches {reference} (looked from {base_dir.absolute()}).",
                hint="Check the pattern; ** also looks in subdirectories.",
                file=reference,
            )
        for match in found:
            file_type(match.name)
        return found
    raise _no_such_file(reference, path)


def _no_such_file(reference: str, path: Path) -> DataError:
    siblings = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    if path.is_symlink():
        hint = f"It is a link to {path.readlink()}, which leads to no file."
    elif near:
        hint = f"Did you mean {Path(reference).with_name(near[0])}?"
    elif not path.parent.is_dir():
        hint = f"There is no directory {path.parent}."
    else:
        hint = "Check the path; relative ones start at the current directory."
    return DataError(f"There is no file {reference} (looked for {path.absolute()}).", hint=hint, file=reference)


def local_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of one local file, called `name` in messages."""
    files = fsspec.filesystem("file")  # not by URL: fsspec does not decode what a URL must encode, such as a space
    with _explained(name), files.open(str(path.absolute()), "rb", compression=_compression(name)) as stream:
        yield from file_rows(stream, name)


def _compression(name: str) -> str | None:
    return {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}.get(Path(name).suffix)


# --- any source -----------------------------------------------------------------------------------------------------


def source_rows(source: DataSource, *, store: Store | None, cache: Path) -> Iterator[Row]:
    """Rows of a source, streamed, each with its place.

    Raises:
        DataError: not there, empty, damaged, or a row that is no object.
        StoreError: a stored file cannot be fetched or does not have its digest.
        PackageError: the package of an example cannot be fetched.
    """
    if isinstance(source, StoredFile):
        assert store is not None, "stored files need their store"
        return local_rows(_fetched(source, store, cache), source.name)
    if source.uri.startswith("example:"):
        return example_rows(source.uri.removeprefix("example:"), cache)
    if source.uri.startswith("hf:"):
        return _hub_rows(source.uri)
    return _remote_rows(source.uri)


def source_name(source: DataSource) -> str:
    return source.name if isinstance(source, StoredFile) else source.uri


def source_identity(source: DataSource) -> str:
    """Changes whenever the bytes behind a source do: the key under which its tokens are cached."""
    if isinstance(source, StoredFile):
        return f"{source.sha256} {Path(source.name).suffixes}"
    if source.uri.startswith("example:"):
        return example_identity(source.uri.removeprefix("example:"))
    if source.uri.startswith("hf:"):
        return f"{source.uri} {_hub_data(source.uri)._fingerprint}"
    fs, files = _remote_files(source.uri)
    with _explained(source.uri):
        facts = [(path, fs.info(path)) for path in files]
    stamps = [
        [path, str(f.get("size")), str(f.get("ETag") or f.get("LastModified") or f.get("mtime"))] for path, f in facts
    ]
    return json.dumps([source.uri, stamps])


def _fetched(source: StoredFile, store: Store, cache: Path) -> Path:
    """A local copy with the right digest: the store's own file if that is on this machine."""
    if store.local:
        local = Path(store.full(file_path(source.sha256)))
        if not local.is_file():
            store.read(file_path(source.sha256))  # raises ObjectMissing with the store's words
        if sha256_file(local) != source.sha256:
            raise CorruptObject(
                f"The stored copy of {source.name} does not have its digest: {local} was changed.",
                hint="Delete it and submit the run again.",
                path=str(local),
            )
        return local
    local = cache / "files" / source.sha256
    local.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{local}.lock"):
        return local if local.is_file() else store.get_file(source.sha256, local)


# --- s3:// ----------------------------------------------------------------------------------------------------------


def _remote_files(uri: str) -> tuple[Any, list[str]]:
    """File system and object names behind an object, a glob or a prefix."""
    with _explained(uri):
        fs, path = fsspec.url_to_fs(uri, use_listings_cache=False)
        if glob.has_magic(path):
            found = [name for name in fs.glob(path) if not fs.isdir(name)]
        elif fs.isfile(path):
            found = [path]
        else:
            found = [name for name in fs.find(path) if known_type(name)]
    if not found:
        raise DataError(f"There is no data file at {uri}.", hint="Check the bucket and the path.", file=uri)
    return fs, sorted(found)


def _remote_rows(uri: str) -> Iterator[Row]:
    fs, files = _remote_files(uri)
    for path in files:
        name = f"{uri.split('://')[0]}://{path}"
        file_type(name)
        with _explained(name), fs.open(path, "rb", compression=_compression(name)) as stream:
            yield from file_rows(stream, name)


# --- hf: ------------------------------------------------------------------------------------------------------------


def _hub_data(uri: str) -> Any:
    """A Hugging Face data set, memory-mapped from the hub's own cache."""
    import datasets

    name, *rest = uri.removeprefix("hf:").split(":")
    split = rest.pop() if rest and rest[-1].split("[")[0] in _SPLITS else "train"
    config = rest.pop() if rest else None
    if rest or not name:
        raise DataError(f"{uri!r} is no data set reference.", hint="Write hf:NAME[:CONFIG][:SPLIT].", value=uri)
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow have no common base class
        raise DataError(
            f"The data set {uri} cannot be loaded: {str(error).strip().splitlines()[0]}",
            hint="Check name, configuration and split on huggingface.co, the network, and HF_TOKEN if it is private.",
            value=uri,
        ) from error


def _hub_rows(uri: str) -> Iterator[Row]:
    for number, row in enumerate(_hub_data(uri), 1):
        yield row, Where(uri, number)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the file system or S3 raises into a DataError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"There is no file {name}.", hint="Check the path.", file=name) from error
    except Exception as error:
        # s3fs turns S3's answers into OSErrors; no credentials and no connection stay botocore's and aiohttp's own
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _S3_LIBRARIES:
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{name} cannot be read: {getattr(error, 'strerror', None) or said}.",
            hint="Check its permissions" + (", the AWS_* credentials and AWS_ENDPOINT_URL." if "://" in name else "."),
            file=name,
        ) from error
