"""Runs in the database: names, references, compare-and-swap, events. About 3 s."""

from __future__ import annotations

import multiprocessing

import pytest

from orchestrator.db import open_database
from orchestrator.errors import IllegalTransition, RunExists, RunNotFound
from orchestrator.runs import repository
from orchestrator.runs.events import Event
from orchestrator.runs.repository import create_run, get_run, list_events, list_runs, transition
from orchestrator.runs.states import RunState
from orchestrator.spec.job import DataSpec, JobSpec


def spec(name: str, tenant: str = "default") -> JobSpec:
    return JobSpec(name=name, tenant=tenant, base_model="m", data=DataSpec(train="t.jsonl"))


def test_a_new_run(world):
    run = create_run(world.db, spec("entities"), ray_address="http://ray:8265")
    stem, end = run.id.rsplit("-", 1)
    assert (stem, len(end)) == ("entities", 6)
    assert (run.state, run.attempt, run.submission_id) == (RunState.VALIDATING_FILES, 1, f"{run.id}-a1")
    assert JobSpec.model_validate(run.spec) == spec("entities")
    assert get_run(world.db, run.id) == get_run(world.db, "entities") == run


def test_a_taken_name_says_state_and_a_free_one(world):
    world.submit("entities")
    world.submit("entities-2")
    with pytest.raises(RunExists, match="it is queued") as caught:
        world.submit("entities")
    assert caught.value.context["suggestion"] == "entities-3"
    assert len(list_runs(world.db)) == 2
    create_run(world.db, spec("entities", "acme"))  # another tenant's names are its own


def test_a_long_name_gets_a_legal_suggestion(world):
    create_run(world.db, spec("n" * 63))
    with pytest.raises(RunExists) as caught:
        create_run(world.db, spec("n" * 63))
    create_run(world.db, spec(caught.value.context["suggestion"]))


def test_an_unknown_run_names_the_nearest(world):
    create_run(world.db, spec("finance-entities"))
    with pytest.raises(RunNotFound, match="Did you mean finance-entities"):
        get_run(world.db, "finance-entites")
    with pytest.raises(RunNotFound, match="There is no run 'finance-entities'"):
        get_run(world.db, "finance-entities", tenant="acme")


def test_a_name_of_two_tenants_needs_the_id(world):
    ids = [create_run(world.db, spec("entities", tenant)).id for tenant in ("acme", "globex")]
    with pytest.raises(RunNotFound, match="Several tenants") as caught:
        get_run(world.db, "entities")
    assert all(run_id in str(caught.value) for run_id in ids)
    assert get_run(world.db, "entities", tenant="acme").id == ids[0]


def test_only_legal_transitions(world):
    run = create_run(world.db, spec("entities"))
    run = transition(world.db, run, RunState.QUEUED)
    run = transition(world.db, run, RunState.SUCCEEDED)
    assert run.finished_at
    with pytest.raises(IllegalTransition, match="has succeeded, so it cannot become running"):
        transition(world.db, run, RunState.RUNNING)


def test_of_two_writers_one_wins(world):
    run = create_run(world.db, spec("entities"))
    transition(world.db, run, RunState.CANCELLED)
    with pytest.raises(IllegalTransition, match="is cancelled"):
        transition(world.db, run, RunState.QUEUED)  # from what was read before
    assert get_run(world.db, run.id).state is RunState.CANCELLED


def test_a_writer_of_an_older_attempt_loses(world):
    run = world.submit()
    failed = transition(world.db, run, RunState.FAILED)
    repository.begin_attempt(world.db, failed, job_env={}, ray_address=None)
    with pytest.raises(IllegalTransition):
        transition(world.db, run, RunState.RUNNING)
    assert get_run(world.db, run.id).attempt == 2


def test_list_is_newest_first_and_filtered(world):
    runs = [create_run(world.db, spec(f"r{n}", "acme" if n % 2 else "default")) for n in range(4)]
    transition(world.db, runs[0], RunState.FAILED)
    assert [run.name for run in list_runs(world.db)] == ["r3", "r2", "r1", "r0"]
    assert [run.name for run in list_runs(world.db, tenant="acme")] == ["r3", "r1"]
    assert [run.name for run in list_runs(world.db, states=[RunState.FAILED])] == ["r0"]
    assert [run.name for run in list_runs(world.db, limit=2)] == ["r3", "r2"]


def test_events_by_cursor(world):
    run = create_run(world.db, spec("entities"))
    events = [Event(id=f"a1-driver-{n}", created_at=n, type="metrics", data={"step": n}) for n in range(5)]
    repository.ingest_events(world.db, run.id, events[::-1], ["segment"])
    repository.ingest_events(world.db, run.id, events, ["segment"])
    assert list_events(world.db, run.id)[1:] == events, "in order of time, once each, behind the creation"
    page = list_events(world.db, run.id, after="a1-driver-1", limit=2)
    assert [event.id for event in page] == ["a1-driver-2", "a1-driver-3"]
    assert list_events(world.db, run.id, after="a1-driver-4") == []
    assert repository.ingested_segments(world.db, run.id) == {"segment"}


def _create(url: str) -> str:
    db = open_database(url)
    try:
        return create_run(db, spec("entities")).id
    except RunExists as error:
        return f"taken: {error.context['state']}"
    finally:
        db.close()


def test_of_four_processes_one_creates_the_run(world):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        got = pool.map(_create, [world.settings.database] * 8, chunksize=1)
    assert sorted(answer.split("-")[0] for answer in got) == ["entities"] + ["taken: validating_files"] * 7
    assert len(list_runs(world.db)) == 1
