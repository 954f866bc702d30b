"""The disk tier: checked-out adapters by digest, in one directory for all replicas of a node.

Any number of processes and threads use it at once, and any of them may be killed at any line:
- a copy appears by a rename, when it is complete;
- one `flock` for each digest: shared while its files are read, exclusive while it is fetched or removed. So each adapter is
  fetched once however many ask, nothing is removed under a reader, and what a killed process held is free;
- one `flock` for the budget: what is being fetched counts from the start, by the size in its name.

Least recently used goes first: what one replica asks for often lies in its memory tier and never comes here, so how often
says little, and how long ago is in the file system for all to see.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import NamedTuple

from orchestrator.errors import AdapterCacheFull, AdapterLoadTimeout, StoreError

_ENTRY = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"\.tmp-(?P<digest>[0-9a-f]{64})-(?P<size>\d+)")
_POLL = 0.02
"""Seconds between two looks at a lock that another process holds: `flock` cannot wait for a limited time."""


@dataclass(frozen=True)
class DiskMetrics:
    hits: int = 0
    fetches: int = 0
    evictions: int = 0
    fetched_bytes: int = 0

    def plus(self, other: DiskMetrics) -> DiskMetrics:
        return DiskMetrics(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


class Source(NamedTuple):
    """Where an adapter comes from that is not on the disk."""

    size: int
    """Bytes that it will take."""
    copy: Callable[[Path], None]
    """Writes its files into an empty directory."""


class _Found(NamedTuple):
    used: float
    """When it was last used, in seconds since the epoch."""
    size: int
    path: Path
    digest: str


@dataclass
class DiskTier:
    """
    Args:
        root: on a local file system; made if it is not there.
        budget: bytes of all adapters together, also while they are fetched.
        patience: seconds to wait for a lock that another holds.
    """

    root: Path
    budget: int
    patience: float = 60.0
    metrics: DiskMetrics = field(default_factory=DiskMetrics)
    """Replaced whole, so that whoever reads it has one moment's."""
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextlib.contextmanager
    def open(self, digest: str, find: Callable[[], Source]) -> Iterator[tuple[Path, bool]]:
        """Its directory, which stays while the block runs, and whether it was fetched for this.

        Args:
            find: asked only if it is not here; what it raises goes to the caller, and no other adapter is touched.

        Raises:
            AdapterCacheFull: there is no room even without everything that nobody reads.
            AdapterLoadTimeout: another process has been fetching it for too long.
        """
        name, fetched = digest.removeprefix("sha256:"), False
        while True:
            with self._locked(name, fcntl.LOCK_SH):
                if (directory := self.root / name).is_dir():
                    os.utime(directory)
                    self._count(hits=int(not fetched))
                    yield directory, fetched
                    return
            with self._locked(name, fcntl.LOCK_EX):
                if not directory.is_dir():
                    try:
                        self._fetch(name, find())
                    except BaseException:
                        self._lock_file(name).unlink(missing_ok=True)  # or each name ever asked for leaves a file
                        raise
                    fetched = True

    def discard(self, digest: str) -> None:
        """Remove a copy that is no good, once nobody reads it."""
        name = digest.removeprefix("sha256:")
        with self._locked(name, fcntl.LOCK_EX):
            shutil.rmtree(self.root / name, ignore_errors=True)
            self._lock_file(name).unlink(missing_ok=True)

    @property
    def used(self) -> int:
        """Bytes, counted now; those that are being fetched are included."""
        return sum(found.size for found in self._found())

    # details

    def _fetch(self, name: str, source: Source) -> None:
        """The caller holds the exclusive lock of `name`."""
        for left in self.root.glob(f".tmp-{name}-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial = self.root / f".tmp-{name}-{source.size}"
        with self._locked("budget", fcntl.LOCK_EX):
            self._make_room(source.size)
            partial.mkdir()
        try:
            try:
                source.copy(partial)
            except (OSError, StoreError) as error:
                if not _disk_full(error):
                    raise
                shutil.rmtree(partial)  # others fill this disk, too: give up what can be spared
                with self._locked("budget", fcntl.LOCK_EX):
                    self._make_room_on_disk(source.size)
                    partial.mkdir()
                self._copy_again(source, partial)
            partial.rename(self.root / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._count(fetches=1, fetched_bytes=source.size)

    def _copy_again(self, source: Source, partial: Path) -> None:
        try:
            source.copy(partial)
        except (OSError, StoreError) as error:
            if _disk_full(error):
                raise self._full(source.size) from error
            raise

    def _make_room(self, size: int) -> None:
        found = sorted(self._found())
        used = sum(entry.size for entry in found)
        for entry in found:
            if used + size <= self.budget:
                return
            if self._remove(entry):
                used -= entry.size
        if used + size > self.budget:
            raise self._full(size)

    def _make_room_on_disk(self, size: int) -> None:
        for entry in sorted(self._found()):
            if self._remove(entry) and shutil.disk_usage(self.root).free > size:
                return

    def _remove(self, entry: _Found) -> bool:
        """Whether it is gone; not so while anybody reads or fetches it."""
        try:
            with self._locked(entry.digest, fcntl.LOCK_EX, wait=False):
                shutil.rmtree(entry.path, ignore_errors=True)
                self._lock_file(entry.digest).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        self._count(evictions=1)
        return True

    def _found(self) -> list[_Found]:
        """Complete copies, and what is being fetched or was left by a process that was killed."""
        found = []
        for path in self.root.iterdir():
            partial = _PARTIAL.fullmatch(path.name)
            with contextlib.suppress(FileNotFoundError):  # removed at this moment
                if partial:
                    found.append(_Found(0.0, int(partial["size"]), path, partial["digest"]))
                elif _ENTRY.fullmatch(path.name):
                    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    found.append(_Found(path.stat().st_mtime, size, path, path.name))
        return found

    def _count(self, **more: int) -> None:
        with self._counting:
            self.metrics = self.metrics.plus(DiskMetrics(**more))

    def _lock_file(self, name: str) -> Path:
        return self.root / f".lock-{name}"

    @contextlib.contextmanager
    def _locked(self, name: str, kind: int, wait: bool = True) -> Iterator[None]:
        """
        Raises:
            BlockingIOError: another holds it, and `wait` is off.
            AdapterLoadTimeout: another holds it for longer than `patience`.
        """
        deadline = time.monotonic() + self.patience
        while (handle := self._lock(name, kind)) is None:
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another holds the lock", name)
            if time.monotonic() > deadline:
                raise AdapterLoadTimeout(
                    f"Another process has held {self._lock_file(name)} for over {self.patience:.0f} s.",
                    hint="Ask again; if it stays so, look for a replica that hangs.",
                    adapter=name,
                )
            time.sleep(_POLL)
        try:
            yield
        finally:
            os.close(handle)

    def _lock(self, name: str, kind: int) -> int | None:
        path = self._lock_file(name)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            # another may have removed the file between our opening and our locking: then the lock means nothing
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)
        return None

    def _full(self, size: int) -> AdapterCacheFull:
        return AdapterCacheFull(
            f"{self.root} has no room for {size:,} bytes more (its budget is {self.budget:,}), and everything in it is in use.",
            hint="Give the disk tier a larger budget, or free some disk space.",
            path=str(self.root),
            budget=self.budget,
        )


def _disk_full(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__
    return False
