"""What a trial that trains apart has reported, kept in the store: whoever goes on with it tells Tune its course from the beginning."""

from __future__ import annotations

import logging

from jobs.sweep.broker import Report
from orchestrator.errors import AdaptoryError, StoreError, TrainingDiverged
from orchestrator.runs.states import TrialState
from orchestrator.store import Store, checkpoints_path, history_path, trial_run

log = logging.getLogger(__name__)


def read(store: Store, run: str, trial: str) -> list[Report]:
    path = history_path(run, trial)
    return store.read_json(path) if store.exists(path) else []


def write(store: Store, run: str, trial: str, history: list[Report]) -> None:
    store.write_json(history_path(run, trial), history)


def ended_by(error: AdaptoryError) -> tuple[str, str]:
    """The state in which an error leaves its trial, and in what words."""
    if isinstance(error, TrainingDiverged):
        return TrialState.DIVERGED.value, error.message
    return TrialState.FAILED.value, str(error)


def forget_checkpoints(store: Store, run: str, trial: str) -> None:
    """Of a trial that nobody goes on with."""
    try:
        store.delete(checkpoints_path(trial_run(run, trial)))
    except StoreError as error:  # they go with the sweep's end
        log.warning("%s", error)
