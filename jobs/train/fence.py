"""Keeps a late writer of an older attempt out of a run."""

from __future__ import annotations

from orchestrator.errors import Superseded
from orchestrator.store import Store, attempt_path


def check_still_ours(store: Store, run: str, attempt: int) -> None:
    """Fence: an attempt that was replaced must not write any more.

    Raises:
        Superseded: a newer attempt owns the run.
    """
    owner = store.read_json(attempt_path(run))["attempt"] if store.exists(attempt_path(run)) else attempt
    if owner > attempt:
        raise Superseded(
            f"Attempt {attempt} of run {run} was replaced by attempt {owner} and stops here.", run=run, attempt=attempt
        )
