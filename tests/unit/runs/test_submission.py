"""What a person does with runs. About 3 s."""

from __future__ import annotations

import subprocess
import threading

import pytest

from orchestrator.errors import ClusterError, DataError, IllegalTransition, RunError, SettingsError
from orchestrator.runs import submission
from orchestrator.runs.client import JobStatus
from orchestrator.runs.repository import list_attempts, list_events, list_runs, open_attempts
from orchestrator.runs.states import RunState
from orchestrator.settings import Settings
from orchestrator.spec.job import JobSpec
from orchestrator.spec.resolved import ResolvedData, ResolvedSpec
from orchestrator.store import Store, attempt_path, control_path, spec_path


def test_what_the_job_gets(world):
    run = world.submit()
    job = world.jobs.jobs[f"{run.id}-a1"]
    assert job.entrypoint == f"python -m jobs.train --store {world.store.url} --run {run.id} --attempt 1"
    assert job.env == {"ADAPTORY_STORE_URL": world.store.url, "ADAPTORY_HOME": str(world.settings.home)}
    assert job.metadata == {"run": run.id, "attempt": "1", "tenant": "default", "name": "entities"}
    resolved = ResolvedSpec.model_validate(world.store.read_json(spec_path(run.id)))
    assert (resolved.run, resolved.store_url, resolved.git_commit) == (run.id, world.store.url, "0" * 40)
    assert resolved.spec == JobSpec.model_validate(run.spec)
    assert {"python", "adaptory", "ray"} <= set(resolved.versions)
    assert world.store.read_json(attempt_path(run.id)) == {"attempt": 1}
    assert [event.data["state"] for event in list_events(world.db, run.id)] == ["validating_files", "queued"]


def test_no_secret_leaves(world, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "ADAPTORY_DATABASE_URL", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://key:hunter2@minio")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    s3 = Store("s3://bucket/prefix")
    assert submission.job_env(world.settings, s3) == {
        "ADAPTORY_STORE_URL": "s3://bucket/prefix",
        "ADAPTORY_HOME": str(world.settings.home),
        "AWS_REGION": "eu-1",
    }
    remote = Settings(home=world.settings.home, ray_address="http://ray:8265")
    assert submission.job_env(remote, s3) == {"ADAPTORY_STORE_URL": "s3://bucket/prefix"}


def test_a_store_url_with_a_password_is_refused(world):
    store = Store(world.store.url)
    store.url = "s3://key:hunter2@bucket"
    with pytest.raises(SettingsError) as caught:
        world.submit(store=store)
    assert "hunter2" not in str(caught.value)
    assert list_runs(world.db) == []


def test_a_local_base_model_is_made_absolute(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    spec = JobSpec.model_validate({"name": "x", "base_model": "models", "data": {"train": "t.jsonl"}})
    run = world.submit(spec=spec)
    assert run.resolved["base_model"] == str(tmp_path / "models")
    run = world.submit(spec=spec.model_copy(update={"name": "y"}), resolve_base_model=lambda _: "store:bases/abc")
    assert run.resolved["base_model"] == "store:bases/abc"


@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt()])
def test_failed_preparation_frees_the_name(world, error):
    def broken(spec, *, store):
        raise error

    with pytest.raises(type(error)):
        world.submit(resolve_data=broken)
    assert list_runs(world.db) == []
    assert world.jobs.submitted == []
    assert world.submit().state is RunState.QUEUED


def test_cancelled_while_it_is_prepared(world):
    def slow(spec, *, store):
        submission.cancel(world.run(), **world.kwargs(), poll=0.0)
        return ResolvedData(train=[], validation=0.1)

    with pytest.raises(IllegalTransition, match="is cancelled"):
        world.submit(resolve_data=slow)
    assert world.run().state is RunState.CANCELLED
    assert (world.jobs.submitted, open_attempts(world.db)) == ([], [])
    with pytest.raises(RunError, match="never prepared"):
        submission.resume(world.run(), **world.kwargs())
    world.submit()  # the name is free


def test_a_cluster_that_goes_away_leaves_the_run_queued(world):
    world.jobs.away = True
    with pytest.raises(ClusterError, match="stays queued"):
        world.submit()
    assert (world.run().state, world.jobs.submitted) == (RunState.QUEUED, [])
    assert world.reconcile().warnings
    assert world.run().state is RunState.QUEUED
    world.jobs.away = False
    world.reconcile()
    world.reconcile()
    assert world.jobs.submitted == [world.run().submission_id]


def test_pause_waits_for_the_checkpoint_and_resume_goes_on(world):
    run = world.submit()
    world.says_running(run)
    said: list[str] = []

    def job_sees_it() -> None:
        while not world.store.exists(control_path(run.id, 1)):
            pass
        assert world.store.read_json(control_path(run.id, 1)) == {"action": "pause"}
        world.says_result(run, RunState.PAUSED)
        world.jobs.jobs[run.submission_id].status = JobStatus.SUCCEEDED

    job = threading.Thread(target=job_sees_it)
    job.start()
    run = submission.pause(run, **world.kwargs(), say=said.append, poll=0.05)
    job.join()
    assert (run.state, run.finished_at) == (RunState.PAUSED, None)
    assert said[-1] == "entities is paused."
    with pytest.raises(IllegalTransition, match="nothing to pause"):
        submission.pause(run, **world.kwargs())

    run = submission.resume(run, **world.kwargs())
    assert (run.state, run.attempt, run.result) == (RunState.QUEUED, 2, None)
    assert world.jobs.submitted == [f"{run.id}-a1", f"{run.id}-a2"]
    world.reconcile()
    assert world.run().state is RunState.QUEUED, "the first attempt's result is not the second's"
    assert [(a.number, a.ended_at is None) for a in list_attempts(world.db, run.id)] == [(1, False), (2, True)]


def test_pause_returns_when_the_run_ends_instead(world):
    run = world.submit()
    ends = threading.Timer(0.2, setattr, (world.jobs.jobs[run.submission_id], "status", JobStatus.FAILED))
    ends.start()
    assert submission.pause(run, **world.kwargs(), poll=0.05).state is RunState.FAILED
    with pytest.raises(IllegalTransition, match="has failed"):
        submission.pause(run, **world.kwargs())


@pytest.mark.parametrize("running", [False, True])
def test_cancel(world, running):
    run = world.submit()
    if running:
        world.says_running(run)
    run = submission.cancel(run, **world.kwargs(), poll=0.0)
    assert run.state is RunState.CANCELLED
    assert world.jobs.jobs[run.submission_id].status is JobStatus.STOPPED
    assert world.store.read_json(control_path(run.id, 1)) == {"action": "cancel"}
    assert open_attempts(world.db) == []
    with pytest.raises(IllegalTransition, match="is cancelled already"):
        submission.cancel(run, **world.kwargs())


def test_cancel_of_a_run_that_has_just_succeeded(world, tmp_path):
    run = world.submit()
    world.succeeds(run, tmp_path / "adapter")
    with pytest.raises(IllegalTransition, match="has succeeded"):
        submission.cancel(run, **world.kwargs())
    assert world.run().adapter


def test_cancel_without_a_cluster_asks_through_the_store(world):
    run, said = world.submit(), []
    world.jobs.away = True
    run = submission.cancel(run, **world.kwargs(), say=said.append, poll=0.0)
    assert run.state is RunState.CANCELLED
    assert "asked through the store" in said[0]
    world.jobs.away = False
    world.reconcile()
    assert world.jobs.stopped == [run.submission_id]


def test_a_job_that_does_not_stop_is_stopped_again(world):
    run = world.submit()
    world.jobs.stubborn = True
    submission.cancel(run, **world.kwargs(), poll=0.0, timeout=0.0)
    world.jobs.stubborn = False
    assert not world.jobs.jobs[run.submission_id].status.final
    world.reconcile()
    assert world.jobs.jobs[run.submission_id].status.final


def test_resume_needs_a_run_that_stands(world, tmp_path):
    run = world.submit()
    with pytest.raises(IllegalTransition, match="is queued"):
        submission.resume(run, **world.kwargs())
    world.succeeds(run, tmp_path / "adapter")
    with pytest.raises(IllegalTransition, match="has succeeded"):
        submission.resume(run, **world.kwargs())
    assert world.jobs.submitted == [run.submission_id]


def test_resume_of_a_run_whose_cluster_died_unseen(world):
    run = world.submit()
    world.says_running(run)
    world.reconcile()
    world.jobs.jobs.clear()  # the machine was switched off
    run = submission.resume(run, **world.kwargs())
    assert (run.state, run.attempt) == (RunState.QUEUED, 2)


def test_a_run_keeps_its_store(world, tmp_path):
    run = world.submit()
    elsewhere = Store(str(tmp_path / "other"))
    kwargs = world.kwargs() | {"store": elsewhere}
    run = submission.cancel(run, **kwargs, poll=0.0)
    submission.resume(run, **kwargs)
    assert elsewhere.list("") == []
    assert world.store.read_json(attempt_path(run.id)) == {"attempt": 2}


def test_git_commit(tmp_path):
    assert submission.git_commit(tmp_path) is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(git + command, check=True)
    commit = submission.git_commit(tmp_path)
    assert len(commit) == 40
