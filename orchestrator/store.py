"""The artifact store: the only durable channel between a job and the control plane.

One class over fsspec serves a local directory and `s3://bucket/prefix`. A single object is written atomically (a temporary
name and a rename on disk, one PUT on S3). A directory is *published*: its files first, `manifest.json` last, so a directory
without its manifest does not exist for readers, and a reader checks every byte against the manifest.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from pydantic import BaseModel, Field

from orchestrator.errors import AdaptoryError, CorruptObject, DiskFull, ObjectMissing, OutputError, StoreError

MANIFEST = "manifest.json"


# --- one function per path ------------------------------------------------------------------------------------------


def file_path(sha256: str) -> str:
    return f"files/{sha256}"


def base_path(digest: str) -> str:
    return f"bases/{_plain(digest)}"


def adapter_path(digest: str) -> str:
    return f"adapters/{_plain(digest)}"


def run_path(run: str) -> str:
    return f"runs/{run}"


def spec_path(run: str) -> str:
    return f"runs/{run}/spec.json"


def result_path(run: str) -> str:
    return f"runs/{run}/result.json"


def attempt_path(run: str) -> str:
    """Names the attempt that owns the run, or the sweep that the trial belongs to; a writer of an older one is fenced off."""
    return f"runs/{run.partition('/')[0]}/attempt.json"


def control_path(run: str, attempt: int) -> str:
    """What the control plane asks of a running attempt: `{"action": "pause" | "cancel"}`."""
    return f"runs/{run}/control/a{attempt}.json"


def stop_trials_path(run: str) -> str:
    """Which trials of a sweep a person has ended: `{"stop_trials": ["t03"]}`; it holds for all attempts."""
    return f"runs/{run}/control/stop_trials.json"


def checkpoints_path(run: str) -> str:
    return f"runs/{run}/checkpoints"


def checkpoint_path(run: str, step: int) -> str:
    return f"{checkpoints_path(run)}/{step:08d}"


def trial_path(run: str, trial: str) -> str:
    """What a sweep's trial that came to its end has trained, with its reports; until the sweep's end decides what is published."""
    return f"runs/{run}/trials/{trial}"


def separate_path(run: str) -> str:
    """What trials that train apart from each other need to go on; nothing of it outlives the last of them."""
    return f"runs/{run}/separate"


def trial_run(run: str, trial: str) -> str:
    """Stands for a run's id in the paths of a trial that trains apart: `checkpoints_path(trial_run(…))`."""
    return f"{run}/separate/{trial}"


def history_path(run: str, trial: str) -> str:
    """What a trial that trains apart has reported."""
    return f"runs/{trial_run(run, trial)}/history.json"


def alone_path(run: str) -> str:
    """Why a sweep's trials cannot be packed, once a group has found out: `{"why": "…"}`."""
    return f"runs/{run}/alone.json"


def names_path(run: str) -> str:
    """What people call a sweep's trials, by Ray Tune's ids."""
    return f"runs/{run}/trials.json"


def segments_path(run: str, stream: str) -> str:
    """Directory of a run's `events` or `logs`."""
    return f"runs/{run}/{stream}"


def segment_path(run: str, stream: str, attempt: int, writer: str, number: int) -> str:
    return f"{segments_path(run, stream)}/a{attempt}-{writer}-{number:06d}.jsonl"


def train_storage_path(run: str) -> str:
    """Where Ray Train keeps its own small state."""
    return f"runs/{run}/ray"


def _plain(digest: str) -> str:
    return digest.removeprefix("sha256:")


# --- manifest -------------------------------------------------------------------------------------------------------


class ManifestFile(BaseModel):
    size: int
    """Bytes."""
    sha256: str


class Manifest(BaseModel):
    """What a published directory holds; written last."""

    files: dict[str, ManifestFile]
    """By path relative to the directory, with forward slashes."""

    metadata: dict[str, Any] = Field(default_factory=dict)


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- the store ------------------------------------------------------------------------------------------------------


class Store:
    """Objects by relative path under one URL.

    Args:
        url: a directory, `file://…`, or `s3://bucket/prefix`. Credentials and endpoint come from the AWS_* environment.

    Raises (from every method):
        StoreError: the store cannot be reached or refuses; the message names the URL and what to check.
        DiskFull: a local one has no room left.
        ObjectMissing: a read of something that is not there.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())
        with self._explained(""):
            self.fs, self.root = fsspec.url_to_fs(self.url, **_options(self.url))

    @property
    def local(self) -> bool:
        return not self.url.startswith("s3://")

    def full(self, path: str) -> str:
        """The file system's own name of `path`; refuses one that would leave the store."""
        parts = path.split("/")
        if path.startswith("/") or ".." in parts or "" in parts[:-1]:
            raise StoreError(f"{path!r} is not a path inside the store.", url=self.url, path=path)
        return f"{self.root}/{path}"

    # single objects

    def write(self, path: str, data: bytes) -> None:
        """Write one object atomically: readers see the old bytes or the new, never a part."""
        target = self.full(path)
        with self._explained(path):
            if self.local:
                _write_local(Path(target), data)
            else:
                self.fs.pipe_file(target, data)

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, json.dumps(value, indent=1, sort_keys=True).encode())

    def read(self, path: str) -> bytes:
        with self._explained(path):
            return self.fs.cat_file(self.full(path))

    def read_json(self, path: str) -> Any:
        data = self.read(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise CorruptObject(f"{self.url}/{path} is not JSON ({error}).", url=self.url, path=path) from error

    def exists(self, path: str) -> bool:
        with self._explained(path):
            self.fs.invalidate_cache()
            return self.fs.exists(self.full(path))

    def list(self, prefix: str) -> list[str]:
        """Paths of all objects below `prefix`, relative to the store, sorted; empty when there is none."""
        with self._explained(prefix):
            self.fs.invalidate_cache()
            found = self.fs.find(self.full(prefix))
        names = (name[len(self.root) + 1 :] for name in found)
        return sorted(name for name in names if not Path(name).name.startswith(".tmp-"))

    def children(self, prefix: str) -> builtins.list[str]:
        """Names directly below `prefix`, sorted; empty when there is none."""
        with self._explained(prefix):
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.full(prefix), detail=False)
            except FileNotFoundError:
                return []
        return sorted(Path(name).name for name in found if Path(name).name and not Path(name).name.startswith(".tmp-"))

    def delete(self, path: str) -> None:
        """Remove an object, or everything below a directory (its manifest first); nothing there is no error."""
        with self._explained(path):
            target = self.full(path)
            self.fs.invalidate_cache()
            if not self.fs.exists(target):
                return
            if self.fs.exists(f"{target}/{MANIFEST}"):
                self.fs.rm_file(f"{target}/{MANIFEST}")
            self.fs.rm(target, recursive=True)

    # objects that others wrote, without a manifest

    def download(self, path: str, local: Path) -> None:
        """Copy one object to `local`, which appears when it is complete; there is no digest to check it against.

        Raises:
            OutputError: it cannot be written here.
        """
        self._download(path, local, None)

    def identity(self, path: str) -> str:
        """Changes when the object changes: its size with its ETag, or with its time of change."""
        with self._explained(path):
            self.fs.invalidate_cache()
            facts = self.fs.info(self.full(path))
        return f"{facts['size']}-{facts.get('ETag') or facts.get('mtime')}"

    # content-addressed files

    def put_file(self, local: Path) -> str:
        """Store a file under its SHA-256; returns the digest. Storing it twice copies it once."""
        digest = sha256_file(local)
        target = file_path(digest)
        if not self.exists(target):
            self._upload(local, target)
        return digest

    def get_file(self, sha256: str, local: Path) -> Path:
        """Fetch a content-addressed file to `local`, checking its digest; returns `local`."""
        self._download(file_path(sha256), local, sha256)
        return local

    # published directories

    def publish(
        self, prefix: str, directory: Path, metadata: dict[str, Any] | None = None, *, move: bool = False
    ) -> Manifest:
        """Copy every file of `directory` to `prefix`, then its manifest. Until then readers see nothing there.

        Args:
            move: the files may go from `directory`, whatever comes of it: on the same disk nothing is written twice.
        """
        names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
        files = {
            name: ManifestFile(size=(directory / name).stat().st_size, sha256=sha256_file(directory / name))
            for name in names
            if name != MANIFEST
        }
        manifest = Manifest(files=files, metadata=metadata or {})
        for name in files:
            self._upload(directory / name, f"{prefix}/{name}", move=move)
        self._write_manifest(prefix, manifest)
        return manifest

    def add(self, prefix: str, file: Path) -> Manifest:
        """Put one more file into a published directory, or replace it, and its entry into the manifest after that. Of
        several processes only one may do this at a time."""
        manifest = self.manifest(prefix)
        if manifest is None:
            raise ObjectMissing(f"There is nothing complete at {self.url}/{prefix}.", url=self.url, path=prefix)
        manifest.files[file.name] = ManifestFile(size=file.stat().st_size, sha256=sha256_file(file))
        self._upload(file, f"{prefix}/{file.name}")
        self._write_manifest(prefix, manifest)
        return manifest

    def manifest(self, prefix: str) -> Manifest | None:
        """The manifest of a published directory, or None when it was never completed."""
        try:
            return Manifest.model_validate_json(self.read(f"{prefix}/{MANIFEST}"))
        except ObjectMissing:
            return None
        except ValueError as error:
            raise CorruptObject(f"The manifest of {self.url}/{prefix} cannot be read: {error}", path=prefix) from error

    def fetch(self, prefix: str, directory: Path) -> Manifest:
        """Copy a published directory to `directory`, checking every file against the manifest."""
        manifest = self.manifest(prefix)
        if manifest is None:
            raise ObjectMissing(f"There is nothing complete at {self.url}/{prefix}.", url=self.url, path=prefix)
        for name, entry in manifest.files.items():
            target = (directory / name).resolve()
            if not target.is_relative_to(directory.resolve()):
                raise CorruptObject(f"The manifest of {prefix} names {name!r}, outside its directory.", path=prefix)
            self._download(f"{prefix}/{name}", target, entry.sha256)
        return manifest

    def probe(self) -> None:
        """Write, read back and remove a small object; raises StoreError when any of it fails."""
        path, data = f"probes/{uuid.uuid4().hex}", uuid.uuid4().bytes
        self.write(path, data)
        if self.read(path) != data:
            raise StoreError(f"The store {self.url} gave back other bytes than were written.", url=self.url)
        self.delete(path)

    # details

    def _write_manifest(self, prefix: str, manifest: Manifest) -> None:
        self.write(f"{prefix}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())

    def _upload(self, local: Path, path: str, *, move: bool = False) -> None:
        target = self.full(path)
        with self._explained(path):
            if self.local:
                _copy_local(local, Path(target), move=move)
            else:
                self.fs.put_file(str(local), target)

    def _download(self, path: str, local: Path, sha256: str | None) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            try:
                with self._explained(path):
                    self.fs.get_file(self.full(path), str(partial))
            except StoreError as error:
                raise _at_this_end(error, partial) from error.__cause__
            if sha256 is not None and (found := sha256_file(partial)) != sha256:
                raise CorruptObject(
                    f"{self.url}/{path} has digest {found[:12]}…, expected {sha256[:12]}…: the bytes were changed.",
                    hint="Do not use it; restore it from a backup or make it again.",
                    url=self.url,
                    path=path,
                )
            partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turn what fsspec, botocore and the system raise into a StoreError that says what to do."""
        where = f"{self.url}/{path}" if path else self.url
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise ObjectMissing(f"There is nothing at {where}.", url=self.url, path=path) from error
        except Exception as error:  # botocore and aiohttp have no common base class
            if self.local and getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(Path(f"{self.root}/{path}")) from error
            raise StoreError(
                f"The store {where} cannot be used: {_first_line(error).rstrip('.')}.",
                hint=_hint(error),
                url=self.url,
                path=path,
            ) from error


def disk_full(path: Path) -> DiskFull:
    """The error for a file that found no room."""
    usage = shutil.disk_usage(_existing(path))
    return DiskFull(
        f"There is no room for {path}: {_size(usage.free)} of the disk's {_size(usage.total)} are free.",
        hint="Free some space there, then do it again (`adaptory runs resume` for a run); what was written before is intact.",
        path=str(path),
        free=usage.free,
        total=usage.total,
    )


def disk_free(path: Path) -> int:
    """Bytes that may still be written where `path` is or will be."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _options(url: str) -> dict[str, Any]:
    return {"use_listings_cache": False} if url.startswith("s3://") else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _hint(error: Exception) -> str:
    number, text = getattr(error, "errno", None), f"{type(error).__name__} {error}"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) and "s3" not in text.lower():
        return "Give this user write access, or point ADAPTORY_STORE_URL elsewhere."
    if "credentials" in text.lower() or "AccessKey" in text or "Forbidden" in text or number == errno.EACCES:
        return "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy."
    return "Check ADAPTORY_STORE_URL, that the disk or bucket exists, and AWS_ENDPOINT_URL for S3-compatible stores."


def _at_this_end(error: StoreError, local: Path) -> AdaptoryError:
    """What stopped a download: the store, or the disk that it was to be written to."""
    cause = error.__cause__
    if not isinstance(cause, OSError):
        return error
    named = str(local) in (cause.filename, cause.filename2)
    if not named and cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # reading meets none of these
        return error
    return OutputError(
        f"{local.parent} cannot be written: {cause.strerror}.",
        hint="Make room or allow it there, or choose another directory.",
        file=str(local.parent),
    )


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place, flushed to disk, if the block succeeds."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # no directory can be made here at all; it must not read as a missing object
        raise PermissionError(errno.EACCES, "no directory can be made there", str(target.parent)) from error
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _write_local(target: Path, data: bytes) -> None:
    with _replacing(target) as partial:
        partial.write_bytes(data)


def _copy_local(source: Path, target: Path, *, move: bool = False) -> None:
    with _replacing(target) as partial:
        if move:
            try:
                source.replace(partial)
                return
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        shutil.copyfile(source, partial)
