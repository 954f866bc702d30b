"""Checkpoints in the store: independent of the number of workers, complete or not there, uploaded in the background."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from jobs.train.background import Background
from jobs.train.engines import State
from jobs.train.exhausted import explained_exhaustion
from jobs.train.fence import check_still_ours
from jobs.train.setup import Place
from orchestrator.errors import CorruptObject, ObjectMissing, StoreError, Superseded
from orchestrator.spec.job import CheckpointSpec
from orchestrator.store import Store, checkpoint_path, checkpoints_path

log = logging.getLogger(__name__)

Found = tuple[int, State, dict[str, Any]]
"""Steps done, state, facts."""


class Checkpoints:
    """Saves and restores a run's checkpoints.

    One upload is in flight at a time, in a thread of its own; a failed one is reported and the run goes on, since the
    checkpoint before it is still there.

    Args:
        report: called with a message when a checkpoint is complete (`level` info) or could not be written (warn).
    """

    def __init__(
        self,
        store: Store,
        run: str,
        attempt: int,
        keep: CheckpointSpec,
        report: Callable[..., None] = lambda *a, **k: None,
    ):
        self._store, self._run, self._attempt, self._keep, self._report = store, run, attempt, keep, report
        self._background = Background()

    def save(self, step: int, state: State, facts: dict[str, Any], *, wait: bool = False) -> None:
        """Publish the state after `step` steps.

        Args:
            state: copies that nobody changes any more.
            facts: small JSON kept beside it (`validation_loss`, totals, …).

        Raises:
            Superseded: a newer attempt owns the run.
        """
        self._background.start(lambda: self._publish(step, state, facts))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the upload in flight is done.

        Raises:
            Superseded: a newer attempt owns the run.
        """
        self._background.wait()

    def finish(self) -> None:
        """Let an upload in flight end, whatever comes of it."""
        self._background.finish()

    def latest(self) -> Found | None:
        """The newest complete and undamaged checkpoint."""
        for name in reversed(self._store.children(checkpoints_path(self._run))):
            try:
                if self._store.manifest(f"{checkpoints_path(self._run)}/{name}") is not None:  # else never completed
                    return self.at(int(name))
            except (CorruptObject, ObjectMissing) as error:
                self._report(f"Checkpoint {name} is damaged and passed over: {error}", level="warn")
        return None

    def at(self, step: int) -> Found:
        """The checkpoint after `step` steps.

        Raises:
            ObjectMissing: it is not there, or not complete.
            CorruptObject: its bytes were changed.
        """
        with tempfile.TemporaryDirectory(prefix="adaptory-") as folder:
            manifest = self._store.fetch(checkpoint_path(self._run, step), Path(folder))
            state = {kind: load_file(Path(folder) / f"{kind}.safetensors") for kind in _KINDS}
        return step, state, manifest.metadata

    def agreed(self, place: Place) -> Found | None:
        """The checkpoint that every worker goes on from: the latest one that rank 0 can read.

        Each looking for itself, two could begin at different steps: an upload is completed between their looks, or one of
        them meets damage.

        Raises:
            StoreError: rank 0 went on from a checkpoint that this rank cannot read.
        """
        found = self.latest() if place.rank == 0 else None
        step = place.gathered(_NONE if found is None else found[0])[0]
        if place.rank == 0 or step == _NONE:
            return found
        try:
            return self.at(step)
        except StoreError as error:
            raise StoreError(
                f"Worker {place.rank} cannot read the checkpoint at step {step}, from which worker 0 goes on: "
                f"{error.message}",
                hint="The store must show every node the same files: check that this node mounts or reaches the same "
                "one, then resume the run.",
                step=step,
                rank=place.rank,
            ) from error

    def _publish(self, step: int, state: State, facts: dict[str, Any]) -> None:
        try:
            check_still_ours(self._store, self._run, self._attempt)
            with explained_exhaustion("saving"), tempfile.TemporaryDirectory(prefix="adaptory-") as folder:
                for kind in _KINDS:
                    save_file(state[kind], Path(folder) / f"{kind}.safetensors")
                self._store.publish(checkpoint_path(self._run, step), Path(folder), {"step": step, **facts}, move=True)
            self._prune()
            self._report(f"Checkpoint {step} saved.", step=step)
        except Superseded:
            raise
        except Exception as error:  # safetensors' own errors among them: whatever it is, training need not end
            self._report(f"Checkpoint {step} could not be saved; the run goes on: {error}", level="warn", step=step)
            self._sweep(step)

    def _sweep(self, step: int) -> None:
        """Remove what an upload that failed left behind: on a full disk it is room for the next one, or for the result."""
        path = checkpoint_path(self._run, step)
        with contextlib.suppress(StoreError, Superseded):
            check_still_ours(self._store, self._run, self._attempt)
            if self._store.manifest(path) is None:
                self._store.delete(path)

    def _prune(self) -> None:
        """Keep the last few and the best; incomplete ones older than the newest are swept up as well."""
        folder = checkpoints_path(self._run)
        names = self._store.children(folder)
        losses = {}
        for name in names:
            manifest = self._store.manifest(f"{folder}/{name}")
            if manifest and manifest.metadata.get("validation_loss") is not None:
                losses[name] = manifest.metadata["validation_loss"]
        kept = set(names[-self._keep.keep_last :])
        if self._keep.keep_best and losses:
            kept.add(min(losses, key=lambda name: losses[name]))
        for name in names:
            if name not in kept:
                self._store.delete(f"{folder}/{name}")


_KINDS = ("weights", "exp_avg", "exp_avg_sq")
_NONE = -1
