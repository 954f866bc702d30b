"""Send a prepared run to Ray, and tell a job what is wanted of it. Every step here may be repeated without harm."""

from __future__ import annotations

import os
import shlex
from typing import Literal

from orchestrator.db import Database, leases
from orchestrator.errors import ObjectMissing
from orchestrator.runs.client import JobClient
from orchestrator.runs.repository import get_run, transition
from orchestrator.runs.run import Run
from orchestrator.runs.states import RunState
from orchestrator.settings import Settings
from orchestrator.store import Store, attempt_path, control_path, spec_path

_S3_PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


def launch(db: Database, store: Store, jobs: JobClient, run: Run) -> Run:
    """Write what the job reads, fence off older attempts, queue the run and hand it to Ray.

    Anybody may do this for a run whose resolved spec is saved, and do it again after a kill at any line: the files are
    the same, and Ray takes a submission id once.

    Raises:
        ClusterError, StoreError: the run stays as it is, to be sent later.
    """
    with leases.holding(db, f"launch:{run.id}", wait=30) as got:
        now = get_run(db, run.id)
        if not got or now.attempt != run.attempt or now.state not in (RunState.VALIDATING_FILES, RunState.QUEUED):
            return now  # somebody else sends it, or it was cancelled meanwhile
        store.write_json(spec_path(now.id), now.resolved)
        store.write_json(attempt_path(now.id), {"attempt": now.attempt})
        if now.state is RunState.VALIDATING_FILES:
            now = transition(db, now, RunState.QUEUED, message="The run is queued.")
        metadata = {"run": now.id, "attempt": str(now.attempt), "tenant": now.tenant, "name": now.name}
        jobs.submit(now.submission_id, entrypoint(store, now), env=now.job_env or {}, metadata=metadata)
        return now


def store_of(run: Run, store: Store) -> Store:
    """The store that the run was submitted with, which need not be today's."""
    url = (run.resolved or {}).get("store_url", store.url)
    return store if url == store.url else Store(url)


def entrypoint(store: Store, run: Run) -> str:
    module = "jobs.sweep" if run.sweeps else "jobs.train"
    parts = ["python", "-m", module, "--store", store.url, "--run", run.id, "--attempt", str(run.attempt)]
    return shlex.join(parts)


def job_env(settings: Settings, store: Store) -> dict[str, str]:
    """The job's environment: where things are, and never a secret, since Ray shows it to whoever sees the dashboard.

    Credentials come from the nodes' own environment. On the local Ray the job shares this machine's cache, and finds an
    S3-compatible store where this process finds it.
    """
    env = {"ADAPTORY_STORE_URL": store.url}
    if not settings.remote:
        env["ADAPTORY_HOME"] = str(settings.home)
        places = {} if store.local else {name: os.environ.get(name, "") for name in _S3_PLACES}
        env |= {name: place for name, place in places.items() if place and "@" not in place}
    return env


def request(store: Store, run_id: str, attempt: int, action: Literal["pause", "cancel"]) -> None:
    """Ask a job to pause or to end; it looks every second. Asking to end is not undone by asking to pause."""
    path = control_path(run_id, attempt)
    try:
        if store.read_json(path).get("action") in (action, "cancel"):
            return
    except ObjectMissing:
        pass
    store.write_json(path, {"action": action})
