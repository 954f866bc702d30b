"""Killed at any line, everything is whole again after one more reconciliation. About 15 s."""

from __future__ import annotations

import pytest

from orchestrator.errors import RunNotFound
from orchestrator.runs import submission
from orchestrator.runs.client import JobStatus
from orchestrator.runs.repository import list_adapters, list_attempts, list_events, list_runs, open_attempts
from orchestrator.runs.states import RunState
from orchestrator.store import attempt_path, spec_path


def in_order(world, run_id: str) -> list[float]:
    return [event.data["step"] for event in list_events(world.db, run_id) if event.type == "metrics"]


def test_submit(killed_everywhere):
    ends = set()
    for world in killed_everywhere(lambda world: None, lambda world, _: world.submit()):
        world.reconcile()
        runs = list_runs(world.db)
        if not runs:  # killed before the row was there
            assert world.jobs.submitted == []
            ends.add("nothing")
        elif runs[0].state is RunState.FAILED:  # killed while its data was brought
            assert (runs[0].error or {})["code"] == "job_failed"
            assert world.jobs.submitted == []
            assert open_attempts(world.db) == []
            ends.add("gave up")
        else:
            assert runs[0].state is RunState.QUEUED
            assert world.jobs.submitted == [runs[0].submission_id]
            assert world.store.read_json(spec_path(runs[0].id))["run"] == runs[0].id
            assert world.store.read_json(attempt_path(runs[0].id)) == {"attempt": 1}
            ends.add("queued")
        if runs and runs[0].state is RunState.QUEUED:
            continue
        assert world.submit().state is RunState.QUEUED, "the name is free"
    assert ends == {"nothing", "gave up", "queued"}


def test_reconcile_a_beginning(killed_everywhere):
    def prepare(world):
        run = world.submit()
        world.says_running(run, metrics=3)
        return run

    for world in killed_everywhere(prepare, lambda world, _: world.reconcile()):
        world.reconcile()
        run = world.run()
        assert run.state is RunState.RUNNING
        assert run.started_at
        assert in_order(world, run.id) == [0, 1, 2]


def test_reconcile_a_success(killed_everywhere, tmp_path):
    def prepare(world):
        run = world.submit()
        world.succeeds(run, tmp_path / "adapter")
        return run

    for world in killed_everywhere(prepare, lambda world, _: world.reconcile()):
        world.reconcile()
        world.reconcile()
        run = world.run()
        assert (run.state, run.result.metrics) == (RunState.SUCCEEDED, {"train_loss": 0.5})
        assert in_order(world, run.id) == [0, 1, 2]
        assert [a.digest for a in list_adapters(world.db)] == [run.adapter]
        assert open_attempts(world.db) == []


def test_reconcile_a_failure(killed_everywhere):
    def prepare(world):
        run = world.submit()
        world.jobs.jobs[run.submission_id].status = JobStatus.FAILED
        return run

    for world in killed_everywhere(prepare, lambda world, _: world.reconcile()):
        world.reconcile()
        run = world.run()
        assert (run.state, (run.error or {})["ray_status"]) == (RunState.FAILED, "FAILED")
        assert len([e for e in list_events(world.db, run.id) if e.level == "error"]) == 1


def test_cancel(killed_everywhere):
    def cancel(world, run):
        submission.cancel(run, **world.kwargs(), poll=0.0)

    for world in killed_everywhere(lambda world: world.submit(), cancel):
        world.reconcile()
        run = world.run()
        if run.state is not RunState.CANCELLED:  # killed before the database knew of it
            assert run.state is RunState.QUEUED
            assert world.jobs.stopped == []
            continue
        assert world.jobs.jobs[run.submission_id].status.final
        world.reconcile()
        assert open_attempts(world.db) == []


def test_resume(killed_everywhere):
    def prepare(world):
        return submission.cancel(world.submit(), **world.kwargs(), poll=0.0)

    def resume(world, run):
        submission.resume(run, **world.kwargs())

    for world in killed_everywhere(prepare, resume):
        world.reconcile()
        run = world.run()
        if run.state is RunState.CANCELLED:
            assert run.attempt == 1
            run = submission.resume(run, **world.kwargs())
        assert (run.state, run.attempt) == (RunState.QUEUED, 2)
        assert world.jobs.submitted == [f"{run.id}-a1", f"{run.id}-a2"]
        assert world.store.read_json(attempt_path(run.id)) == {"attempt": 2}
        assert [a.number for a in list_attempts(world.db, run.id)] == [1, 2]


def test_users_error_leaves_nothing(world):
    def missing(spec, *, store):
        raise FileNotFoundError("train.jsonl")

    with pytest.raises(FileNotFoundError):
        world.submit(resolve_data=missing)
    with pytest.raises(RunNotFound):
        world.run()
    assert open_attempts(world.db) == []
    world.submit()
