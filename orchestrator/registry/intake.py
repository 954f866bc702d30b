"""Take over what a job published: prove that it is what its digest says, and sign it with the control plane's key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from orchestrator.db import Database, leases
from orchestrator.errors import AdaptoryError
from orchestrator.registry.signing import Keys
from orchestrator.registry.verification import sign_published
from orchestrator.store import Store

_PATIENCE = 60.0


def take_in(db: Database, store: Store, digest: str, keys: Keys, *, base: Path | None = None) -> bool:
    """Check and sign a published adapter; one that this key has signed is left as it is. Returns whether it was signed.

    Raises:
        AdapterError, CorruptObject, ObjectMissing: as `sign_published`; it is not signed, and nobody loads it.
        AdaptoryError: another process is busy with it for long.
    """
    with publishing_alone(db, digest):
        return sign_published(store, digest, keys, base=base)


@contextlib.contextmanager
def publishing_alone(db: Database, digest: str) -> Iterator[None]:
    """Be the only one that writes into `adapters/<digest>`: two publications of the same weights differ in provenance
    and signature, and files of both under one manifest would be damage."""
    with leases.holding(db, f"publish:{digest}", wait=_PATIENCE) as got:
        if not got:
            raise AdaptoryError(f"Another process is publishing {digest}.", hint="Repeat it when that is done.")
        yield
