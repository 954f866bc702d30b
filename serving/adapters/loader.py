"""One adapter's way from the store to bytes that the engine takes: fetched if it must be, checked always."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import AdapterError, CorruptObject
from orchestrator.store import Store, adapter_path
from serving.adapters.admission import Requirements, admit, check_digest, published, refused
from serving.adapters.disk import DiskMetrics, DiskTier, Source
from serving.engine.prepared import Piece, Prepared


@dataclass(frozen=True)
class LoaderSettings:
    store_url: str
    disk: Path
    """Directory of the disk tier."""
    disk_budget: int
    """Bytes."""
    requirements: Requirements
    parallel: int = 4
    """Adapters in work at once."""
    niceness: int = 10
    """Of the process: the engine's threads go first."""


@dataclass(frozen=True)
class Fetched:
    """What came of one load, beside the bytes."""

    pieces: tuple[Piece, ...]
    numbers: int
    """That follow in the stream, in the engine's dtype."""
    from_store: bool
    seconds: float
    disk: DiskMetrics
    """Of this process, so far."""


class Loader:
    """Store → disk → checked and prepared bytes. Any thread may call it."""

    def __init__(self, settings: LoaderSettings):
        self.settings = settings
        self.disk = DiskTier(settings.disk, settings.disk_budget)
        self._store: Store | None = None

    def load(self, digest: str) -> tuple[Prepared, bool]:
        """An adapter that may be installed, and whether it had to come from the store.

        Raises:
            AdapterError: refused; the `check` says why.
            StoreError, AdapterCacheFull, AdapterLoadTimeout: not now.
        """
        check_digest(digest)
        while True:
            with self.disk.open(digest, lambda: self._source(digest)) as (directory, fetched):
                try:
                    return admit(directory, digest, self.settings.requirements), fetched
                except AdapterError as error:
                    refusal = error
            self.disk.discard(digest)
            if fetched:
                raise refusal
            # else this disk's copy was damaged since it came, and the store's may be good

    def _source(self, digest: str) -> Source:
        if self._store is None:
            self._store = Store(self.settings.store_url)
        store = self._store
        manifest = published(store, digest, self.settings.requirements)

        def copy(directory: Path) -> None:
            try:
                store.fetch(adapter_path(digest), directory)
            except CorruptObject as error:  # its message says where the store is, which is no client's affair
                what = error.message.replace(f"{store.url}/{adapter_path(digest)}/", "")
                raise refused("bytes", digest, f"was changed: {what}", error.hint or "") from error

        return Source(sum(entry.size for entry in manifest.files.values()), copy)
