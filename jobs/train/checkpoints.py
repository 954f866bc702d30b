"""Checkpoints in the store: independent of the number of workers, complete or not there, uploaded in the background."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from jobs.train.engines import State
from jobs.train.fence import check_still_ours
from orchestrator.errors import AdaptoryError, CorruptObject, StoreError, Superseded
from orchestrator.spec.job import CheckpointSpec
from orchestrator.store import Store, checkpoint_path, checkpoints_path

log = logging.getLogger(__name__)


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
        self._thread: threading.Thread | None = None
        self._fatal: AdaptoryError | None = None

    def save(self, step: int, state: State, facts: dict[str, Any], *, wait: bool = False) -> None:
        """Publish the state after `step` steps.

        Args:
            state: copies that nobody changes any more.
            facts: small JSON kept beside it (`validation_loss`, totals, …).

        Raises:
            Superseded: a newer attempt owns the run.
        """
        self.wait()
        self._thread = threading.Thread(target=self._publish, args=(step, state, facts), name="adaptory-checkpoint")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the upload in flight is done."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._fatal:
            raise self._fatal

    def finish(self) -> None:
        """Let an upload in flight end, whatever comes of it."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def latest(self) -> tuple[int, State, dict[str, Any]] | None:
        """The newest complete and undamaged checkpoint: (steps done, state, facts)."""
        for name in reversed(self._store.children(checkpoints_path(self._run))):
            path = f"{checkpoints_path(self._run)}/{name}"
            try:
                manifest = self._store.manifest(path)
                if manifest is None:
                    continue  # never completed
                with tempfile.TemporaryDirectory(prefix="adaptory-") as folder:
                    self._store.fetch(path, Path(folder))
                    state = {kind: load_file(Path(folder) / f"{kind}.safetensors") for kind in _KINDS}
                return int(name), state, manifest.metadata
            except CorruptObject as error:
                self._report(f"Checkpoint {name} is damaged and passed over: {error}", level="warn")
        return None

    def _publish(self, step: int, state: State, facts: dict[str, Any]) -> None:
        try:
            check_still_ours(self._store, self._run, self._attempt)
            with tempfile.TemporaryDirectory(prefix="adaptory-") as folder:
                for kind in _KINDS:
                    save_file(state[kind], Path(folder) / f"{kind}.safetensors")
                self._store.publish(checkpoint_path(self._run, step), Path(folder), {"step": step, **facts})
            self._prune()
            self._report(f"Checkpoint {step} saved.", step=step)
        except Superseded as error:
            self._fatal = error
        except (StoreError, OSError) as error:
            self._report(f"Checkpoint {step} could not be saved; the run goes on: {error}", level="warn", step=step)

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
