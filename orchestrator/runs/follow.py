"""Watch a run as it goes: events straight from the store, its state by reconciling now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from orchestrator.db import Database
from orchestrator.errors import StoreError
from orchestrator.registry.signing import Keys
from orchestrator.runs.client import JobClient
from orchestrator.runs.events import Event, read_events
from orchestrator.runs.launch import store_of
from orchestrator.runs.reconcile import reconcile
from orchestrator.runs.repository import get_run
from orchestrator.runs.run import Run
from orchestrator.store import Store, result_path


def follow(
    run_id: str,
    *,
    db: Database,
    store: Store,
    jobs: JobClient | None,
    ray_address: str | None,
    keys: Keys,
    attempt: int | None = None,
    poll: float = 0.5,
    reconcile_every: float = 3.0,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Event | None]:
    """Events of a run as they come, until it is final or paused and all that it wrote was given; then
    `repository.get_run` says how it ended.

    Yields None when a look found nothing new, so that the caller can redraw or stop.

    Args:
        keys: sign what the run publishes.
        attempt: only this attempt's events; by default those of the present one.
        poll: seconds between looks into the store.
        reconcile_every: seconds between looks at Ray, which are dearer.
        say: told what cannot be seen at the moment (store or cluster away), once each; the watching goes on.
    """
    run = get_run(db, run_id)
    store = store_of(run, store)
    attempt = run.attempt if attempt is None else attempt
    seen: set[str] = set()
    said: set[str] = set()
    next_look = time.monotonic()
    while True:
        over = run.settled or run.attempt != attempt  # known before the last events are read
        events, problem = _new_events(store, run.id, attempt, seen)
        yield from sorted(events, key=lambda event: event.created_at)
        if over and problem is None:
            return
        if not events:
            yield None
            time.sleep(poll)
        problems = [problem] if problem else []
        if time.monotonic() >= next_look or _ended(store, run):
            problems += reconcile(db, store, jobs, ray_address=ray_address, keys=keys, run_id=run.id).warnings
            next_look = time.monotonic() + reconcile_every
        for problem in problems:
            if problem not in said:
                said.add(problem)
                say(problem)
        run = get_run(db, run.id)


def _new_events(store: Store, run_id: str, attempt: int, seen: set[str]) -> tuple[list[Event], str | None]:
    events: list[Event] = []
    try:
        for event in read_events(store, run_id, attempt=attempt, seen=seen):
            events.append(event)  # kept even when the next segment cannot be read
    except StoreError as error:
        return events, str(error)
    return events, None


def _ended(store: Store, run: Run) -> bool:
    """Whether there may be a result to take over at once."""
    try:
        return store.read_json(result_path(run.id)).get("attempt") == run.attempt
    except StoreError:
        return False
