"""What a trial that trains apart has reported, kept in the store: whoever goes on with it tells Tune its course from the beginning."""

from __future__ import annotations

from jobs.sweep.broker import Report
from orchestrator.store import Store, history_path


def read(store: Store, run: str, trial: str) -> list[Report]:
    path = history_path(run, trial)
    return store.read_json(path) if store.exists(path) else []


def write(store: Store, run: str, trial: str, history: list[Report]) -> None:
    store.write_json(history_path(run, trial), history)
