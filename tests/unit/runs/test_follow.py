"""Following a run to its end. About 2 s."""

from __future__ import annotations

import threading

from orchestrator.errors import StoreError
from orchestrator.registry.signing import Keys
from orchestrator.runs import submission
from orchestrator.runs.client import JobStatus
from orchestrator.runs.events import EventWriter
from orchestrator.runs.follow import follow
from orchestrator.runs.states import RunState


def following(world, run, **options):
    places = {"db": world.db, "store": world.store, "jobs": world.jobs, "ray_address": world.settings.ray_address}
    return follow(run.id, **places, keys=Keys.of(world.settings), poll=0.01, **options)


def test_all_events_up_to_the_end(world, tmp_path):
    run = world.submit()
    events = following(world, run, reconcile_every=0.05)
    assert next(events) is None, "nothing yet"
    job = threading.Timer(0.2, world.succeeds, (run, tmp_path / "adapter"))
    job.start()
    seen = [event for event in events if event]
    assert [event.type for event in seen] == ["state", "metrics", "metrics", "metrics"]
    assert world.run().state is RunState.SUCCEEDED


def test_a_result_is_taken_over_at_once(world, tmp_path):
    run = world.submit()
    events = following(world, run, reconcile_every=10_000)
    next(events)
    world.succeeds(run, tmp_path / "adapter")
    assert len([event for event in events if event]) == 4
    assert world.run().state is RunState.SUCCEEDED


def test_a_job_that_dies_ends_it(world):
    run = world.submit()
    world.jobs.jobs[run.submission_id].status = JobStatus.FAILED
    assert list(following(world, run)) == [None]
    assert world.run().state is RunState.FAILED


def test_only_the_present_attempt(world):
    run = world.submit()
    world.says_running(run)
    run = submission.cancel(run, **world.kwargs(), poll=0.0)
    again = submission.resume(run, **world.kwargs())
    writer = EventWriter(world.store, run.id, 2, "driver", interval=60)
    writer.emit("message", "again")
    writer.close()
    world.says_result(again, RunState.PAUSED)
    assert [event.message for event in following(world, run) if event] == ["again"]
    assert [event.type for event in following(world, run, attempt=1) if event] == ["state"]


def test_a_store_and_cluster_that_are_away_for_a_while(world, tmp_path, monkeypatch):
    run, said = world.submit(), []
    read = world.store.list
    monkeypatch.setattr(world.store, "list", lambda prefix: (_ for _ in ()).throw(StoreError("The store is away.")))
    world.jobs.away = True
    events = following(world, run, reconcile_every=0.0, say=said.append)
    assert [next(events) for _ in range(5)] == [None] * 5
    monkeypatch.setattr(world.store, "list", read)
    world.jobs.away = False
    world.succeeds(run, tmp_path / "adapter")
    assert len([event for event in events if event]) == 4
    assert said.count("The store is away.") == 1
    assert any("cannot be reached" in line for line in said)
