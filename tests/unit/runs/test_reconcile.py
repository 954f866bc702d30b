"""What the store and Ray say becomes what the database says. About 3 s."""

from __future__ import annotations

import pytest

from orchestrator.db import leases
from orchestrator.errors import AdaptoryError, DiskFull, JobFailed, StoreError
from orchestrator.runs import submission
from orchestrator.runs.client import JobStatus
from orchestrator.runs.events import EventWriter
from orchestrator.runs.reconcile import stop
from orchestrator.runs.repository import create_run, list_adapters, list_events, open_attempts
from orchestrator.runs.result import RunResult, last_words
from orchestrator.runs.states import RunState
from orchestrator.spec.job import JobSpec
from orchestrator.store import adapter_path, result_path


def test_a_successful_run(world, tmp_path):
    run = world.submit()
    world.says_running(run, metrics=2)
    report = world.reconcile()
    assert report.changed == {run.id: RunState.RUNNING}
    assert world.run().started_at
    world.succeeds(run, tmp_path / "adapter")
    assert world.reconcile().changed == {run.id: RunState.SUCCEEDED}
    run = world.run()
    (adapter,) = list_adapters(world.db)
    assert (adapter.digest, adapter.run_id, adapter.rank) == (run.adapter, run.id, 8)
    assert (adapter.base_digest, adapter.provenance["seed"]) == ("sha256:base", 0)
    assert run.result.metrics == adapter.metrics == {"train_loss": 0.5}
    assert run.finished_at == run.result.finished_at
    assert world.reconcile().changed == {}


def test_a_damaged_adapter_directory_does_not_hold_up_the_run(world, tmp_path):
    run = world.submit()
    world.succeeds(run, tmp_path / "adapter")
    directory = adapter_path(world.store.read_json(result_path(run.id))["adapter"])
    world.store.write(f"{directory}/manifest.json", b"{")
    world.reconcile()
    assert world.run().state is RunState.SUCCEEDED
    assert list_adapters(world.db)[0].provenance == {}


def test_two_tenants_with_equal_weights_both_have_their_adapter(world, tmp_path):
    first = world.submit("one")
    spec = first.spec | {"name": "two", "tenant": "acme"}
    second = world.submit(spec=JobSpec.model_validate(spec))
    for run in (first, second):
        world.succeeds(run, tmp_path / "adapter")
        world.reconcile()
    assert {(a.tenant, a.run_id) for a in list_adapters(world.db)} == {("default", first.id), ("acme", second.id)}


def test_a_failure_of_its_own(world):
    run = world.submit()
    error = {"code": "training_diverged", "message": "The loss is nan at step 7.", "hint": "Lower it.", "step": 7}
    world.says_result(run, RunState.FAILED, error=error)
    world.jobs.jobs[run.submission_id].status = JobStatus.FAILED
    world.reconcile()
    assert (world.run().state, world.run().error) == (RunState.FAILED, error)
    assert list_events(world.db, run.id)[-1].message == "The loss is nan at step 7."


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.SUCCEEDED])
def test_a_job_that_ends_without_a_result_has_failed(world, status):
    run = world.submit()
    job = world.jobs.jobs[run.submission_id]
    job.status, job.message, job.logs = (
        status,
        "exited with 1, last available logs (…):\nmore",
        "\n".join(map(str, range(100))),
    )
    world.reconcile()
    error = AdaptoryError.from_dict(world.run().error)
    assert isinstance(error, JobFailed)
    assert f"Ray says {status.value}: exited with 1; its last words: 99." in str(error)
    assert error.context["log"].splitlines() == [str(n) for n in range(70, 100)]


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.SUCCEEDED, RunState.PAUSED])
def test_a_result_that_a_full_store_did_not_take_is_heard_from_what_the_job_printed(world, state):
    run = world.submit()
    world.says_running(run)
    world.reconcile()
    error = DiskFull("There is no room for /store.", hint="Free some.", free=0).to_dict() if state.final else None
    result = RunResult(attempt=1, state=state, error=error, metrics={"steps": 4.0}, finished_at=7.0)
    job = world.jobs.jobs[run.submission_id]
    job.status = JobStatus.FAILED
    job.logs = f"INFO begins\n{last_words(result)}\nOSError: [Errno 28] No space left on device"
    world.reconcile()
    run = world.run()
    assert (run.state, run.error, run.result) == (state, error, result)
    assert list_events(world.db, run.id)[-1].message == (error["message"] if error else f"The run is {state.value}.")
    assert world.reconcile().changed == {}


@pytest.mark.parametrize(
    "printed", ["adaptory result: {", 'adaptory result: {"attempt": 1, "sta', "of another attempt", "no end"]
)
def test_printed_words_that_are_no_result_of_this_attempt_are_none(world, printed):
    run = world.submit()
    if printed in ("of another attempt", "no end"):
        other = printed == "of another attempt"
        printed = last_words(
            RunResult(attempt=2 if other else 1, state="succeeded" if other else "running", finished_at=7.0)
        )
    job = world.jobs.jobs[run.submission_id]
    job.status, job.logs = JobStatus.FAILED, printed
    world.reconcile()
    assert world.run().error["code"] == JobFailed.code


def test_a_running_job_that_ray_has_forgotten_has_failed(world):
    run = world.submit()
    world.says_running(run)
    world.jobs.jobs.clear()
    world.reconcile()
    assert world.run().state is RunState.FAILED
    assert "does not know its job" in world.run().error["message"]


def test_a_queued_job_that_ray_has_forgotten_is_sent_again(world):
    run = world.submit()
    world.jobs.jobs.clear()
    world.reconcile()
    assert list(world.jobs.jobs) == [run.submission_id]
    assert world.run().state is RunState.QUEUED


def test_stopped_by_hand(world):
    run = world.submit()
    world.jobs.stop(run.submission_id)
    world.reconcile()
    assert world.run().state is RunState.CANCELLED


def test_a_cluster_that_is_away_changes_nothing_and_says_so_once(world):
    runs = [world.submit(f"r{n}") for n in range(3)]
    world.says_running(runs[0])
    world.reconcile()
    world.jobs.away = True
    report = world.reconcile()
    assert (report.changed, len(report.warnings)) == ({}, 1)
    assert "cannot be reached" in report.warnings[0]
    assert world.reconcile(jobs=None).warnings == []
    assert [world.run(run.id).state for run in runs] == [RunState.RUNNING, RunState.QUEUED, RunState.QUEUED]


def test_without_a_cluster_the_store_still_counts(world, tmp_path):
    run = world.submit()
    world.succeeds(run, tmp_path / "adapter")
    assert world.reconcile(jobs=None).changed == {run.id: RunState.SUCCEEDED}
    assert open_attempts(world.db), "until Ray says that the job is over"


def test_events_after_the_result_still_arrive(world, tmp_path):
    run = world.submit()
    world.says_result(run, RunState.SUCCEEDED)
    world.reconcile()
    assert world.run().state is RunState.SUCCEEDED
    writer = EventWriter(world.store, run.id, 1, "rank0", interval=60)
    writer.emit("message", "the last words")
    writer.close()
    world.jobs.jobs[run.submission_id].status = JobStatus.SUCCEEDED
    world.reconcile()
    assert list_events(world.db, run.id)[-1].message == "the last words"
    assert open_attempts(world.db) == []


def test_a_job_that_ends_while_it_is_looked_at(world, tmp_path, monkeypatch):
    run, ask = world.submit(), world.jobs.status

    def ends_meanwhile(submission_id):
        world.succeeds(run, tmp_path / "adapter")
        return ask(submission_id)

    monkeypatch.setattr(world.jobs, "status", ends_meanwhile)
    world.reconcile()
    assert world.run().state is RunState.SUCCEEDED, "its result was there before Ray called it over"


def test_a_late_writer_of_an_older_attempt_is_ignored(world):
    run = world.submit()
    world.says_running(run)
    run = submission.cancel(run, **world.kwargs(), poll=0.0)
    again = submission.resume(run, **world.kwargs())
    world.says_running(run)  # the first attempt was not dead yet
    world.says_result(run, RunState.SUCCEEDED, attempt=1)
    world.reconcile()
    assert (world.run().state, world.run().attempt, world.run().result) == (RunState.QUEUED, 2, None)
    world.says_running(again)
    world.reconcile()
    assert world.run().state is RunState.RUNNING


def test_an_older_attempt_that_lives_on_is_stopped(world):
    run = world.submit()
    world.jobs.stubborn = True
    run = submission.cancel(run, **world.kwargs(), poll=0.0, timeout=0.0)
    again = submission.resume(run, **world.kwargs())
    world.jobs.stubborn = False
    world.reconcile()
    assert world.jobs.jobs[run.submission_id].status is JobStatus.STOPPED
    assert world.jobs.jobs[again.submission_id].status is JobStatus.RUNNING


@pytest.mark.parametrize("written", [b"{ not json", b"{}", b'{"attempt": 1, "state": "running", "finished_at": 1}'])
def test_a_result_that_cannot_be_read(world, written):
    run = world.submit()
    world.store.write(result_path(run.id), written)
    world.reconcile()
    assert world.run().state is RunState.QUEUED, "the job may still write another"
    world.jobs.jobs[run.submission_id].status = JobStatus.SUCCEEDED
    world.reconcile()
    assert world.run().state is RunState.FAILED
    assert "result.json" in world.run().error["message"]


def test_runs_of_another_cluster_are_left_alone(world):
    run = world.submit()
    world.says_running(run)
    world.reconcile()
    elsewhere = type(world.jobs)()
    report = world.reconcile(jobs=elsewhere, ray_address="http://other:8265")
    assert "is on the local Ray" in report.warnings[0]
    assert world.run().state is RunState.RUNNING


def test_one_broken_run_does_not_hide_the_others(world, monkeypatch):
    bad, good = world.submit("bad"), world.submit("good")
    world.says_running(good)
    read = world.store.list

    def broken(prefix):
        if bad.id in prefix:
            raise StoreError("The store is ill.")
        return read(prefix)

    monkeypatch.setattr(world.store, "list", broken)
    report = world.reconcile()
    assert report.changed == {good.id: RunState.RUNNING}
    assert report.warnings == [f"Run {bad.id}: The store is ill."]


def test_only_one_reconciles(world):
    run = world.submit()
    world.says_running(run)
    assert leases.acquire(world.db, "reconcile", "another")
    report = world.reconcile()
    assert (report.skipped, report.changed) == (True, {})
    leases.release(world.db, "reconcile", "another")
    assert world.reconcile().changed


def test_a_run_being_prepared_elsewhere_is_left_alone(world, pass_time):
    spec = world.submit("other").spec | {"name": "entities"}
    run = create_run(world.db, JobSpec.model_validate(spec))
    world.reconcile()
    assert world.run().state is RunState.VALIDATING_FILES
    pass_time()
    world.reconcile()
    assert world.run().state is RunState.FAILED
    assert "submit it again" in world.run().error["hint"]
    assert run.id not in [attempt.run_id for attempt in open_attempts(world.db)]


def test_a_full_store_does_not_keep_a_cancelled_job_alive(world, monkeypatch):
    run = world.submit()
    world.says_running(run)

    def full(*args):
        raise StoreError("The disk is full.")

    monkeypatch.setattr("orchestrator.runs.reconcile.request", full)
    stop(world.store, world.jobs, open_attempts(world.db, run_id=run.id)[0])
    assert world.jobs.stopped == [run.submission_id]
    with pytest.raises(StoreError):
        stop(world.store, None, open_attempts(world.db, run_id=run.id)[0])
