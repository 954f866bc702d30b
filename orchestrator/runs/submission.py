"""What a person does with a run: submit, pause, resume, cancel.

Each step first changes the database and then acts on the store and Ray; reconciliation repeats what a kill left undone.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import orchestrator
from orchestrator.db import Database, leases
from orchestrator.errors import (
    AdaptoryError,
    ClusterError,
    IllegalTransition,
    RunError,
    SettingsError,
    TrialError,
    TrialNotFound,
)
from orchestrator.registry.signing import Keys
from orchestrator.runs import repository
from orchestrator.runs.client import JobClient
from orchestrator.runs.launch import job_env, launch, request, store_of
from orchestrator.runs.reconcile import reconcile, stop
from orchestrator.runs.repository import get_run, transition
from orchestrator.runs.run import Attempt, Run
from orchestrator.runs.states import RunState
from orchestrator.runs.sweeps import SweepProgress, ask_to_stop
from orchestrator.settings import Settings
from orchestrator.spec.job import DataSpec, JobSpec
from orchestrator.spec.resolved import ResolvedData, ResolvedSpec
from orchestrator.store import Store

Say = Callable[[str], None]


class ResolveData(Protocol):
    """`jobs.data.resolve`: puts local files into the store and names all data by what it is."""

    def __call__(self, spec: DataSpec, *, store: Store) -> ResolvedData: ...


def quiet(_: str) -> None:
    """Says nothing."""


def refuse_early(spec: JobSpec, *, store: Store, db: Database) -> None:
    """What `submit` would refuse whatever the cluster says, for callers that would have to start one first.

    Raises:
        RunExists: the name is taken.
        SettingsError: the store's URL holds credentials.
    """
    refuse_credentials(store)
    repository.refuse_taken_name(db, spec)


def submit(
    spec: JobSpec,
    *,
    settings: Settings,
    store: Store,
    db: Database,
    jobs: JobClient,
    resolve_data: ResolveData,
    resolve_base_model: Callable[[str], str] | None = None,
) -> Run:
    """Prepare a run and hand it to Ray.

    Args:
        resolve_base_model: turns `spec.base_model` into what the job loads, e.g. uploads a local directory for a remote
            cluster; by default a local path is made absolute.

    Raises:
        RunExists: the name is taken.
        DataError, ModelError, StoreError, …: preparing failed; no run is kept and the name is free.
        ClusterError: Ray did not take the job; the run stays queued and is sent when the cluster answers.
    """
    refuse_credentials(store)
    holder = leases.new_holder()
    run = repository.create_run(db, spec, ray_address=settings.ray_address, holder=holder)
    with leases.renewing(db, repository.submission_lease(run.id), holder):
        try:
            resolved = resolve(
                spec, run=run, store=store, resolve_data=resolve_data, resolve_base_model=resolve_base_model
            )
            run = repository.save_resolved(db, run, resolved.model_dump(mode="json"), job_env(settings, store))
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(AdaptoryError):
                repository.remove_run(db, run)
            raise
    return _send(db, store, jobs, run)


def resolve(
    spec: JobSpec,
    *,
    run: Run | None,
    store: Store,
    resolve_data: ResolveData,
    resolve_base_model: Callable[[str], str] | None = None,
) -> ResolvedSpec:
    """The complete spec that a job reads; `run` is None for a dry run."""
    return ResolvedSpec(
        run=run.id if run else f"{spec.name}-dryrun",
        spec=spec,
        data=resolve_data(spec.data, store=store),
        base_model=(resolve_base_model or _absolute)(spec.base_model),
        store_url=store.url,
        git_commit=git_commit(),
        versions=versions(),
        created_at=run.created_at if run else time.time(),
    )


def resume(run: Run, *, settings: Settings, store: Store, db: Database, jobs: JobClient) -> Run:
    """Continue a paused, failed or cancelled run from its last checkpoint, as its next attempt.

    Raises:
        IllegalTransition: the run is active or has succeeded.
        RunError: its submission broke off before its data was stored.
        ClusterError: Ray did not take the job; the run stays queued and is sent when the cluster answers.
    """
    run = _as_it_is_now(run, store=store, db=db, jobs=jobs, settings=settings)
    if run.resolved is None and run.settled:
        raise RunError(
            f"Run {run.name} was never prepared, so there is nothing to resume.",
            hint="Its name is free: submit it again.",
            run=run.id,
            state=run.state.value,
        )
    store = store_of(run, store)
    run = repository.begin_attempt(db, run, job_env=job_env(settings, store), ray_address=settings.ray_address)
    return _send(db, store, jobs, run)


def pause(
    run: Run,
    *,
    settings: Settings,
    store: Store,
    db: Database,
    jobs: JobClient | None,
    say: Say = quiet,
    wait: bool = True,
    poll: float = 1.0,
) -> Run:
    """Ask the job to write a checkpoint and end, and wait until it has; the cluster's resources are then free.

    Args:
        wait: False returns as soon as the request is in the store.
        poll: seconds between looks.

    Returns:
        The run: `paused`, or in whatever end it came to before it saw the request.

    Raises:
        IllegalTransition: the run is not active.
    """
    run = _as_it_is_now(run, store=store, db=db, jobs=jobs, settings=settings)
    if not run.state.active or run.resolved is None:
        raise IllegalTransition(
            f"Run {run.name} {run.state.words}: there is nothing to pause.",
            hint="`adaptory runs list` shows what is running.",
            run=run.id,
            state=run.state.value,
        )
    request(store_of(run, store), run.id, run.attempt, "pause")
    say(f"Asked {run.name} to pause; it writes a checkpoint first.")
    if jobs is None:
        say("The cluster does not answer now; if the job is alive, it sees the request in the store.")
    attempt, state = run.attempt, run.state
    while wait and run.attempt == attempt and not run.settled:
        time.sleep(poll)
        run = _as_it_is_now(run, store=store, db=db, jobs=jobs, settings=settings)
        if run.state is not state:
            say(f"{run.name} {run.state.words}.")
            state = run.state
    return run


def stop_trial(run: Run, trial: str, *, settings: Settings, store: Store, db: Database, jobs: JobClient | None) -> bool:
    """Ask a sweep to end one of its trials; what it has reached until then counts. Whether it was not asked before.

    Raises:
        TrialError: the run has no trials, or this one is over.
        TrialNotFound: it has no trial of this name; names the nearest.
        IllegalTransition: the run is not active.
    """
    if not run.sweeps:
        raise TrialError(
            f"Run {run.name} is one fine-tune and has no trials.",
            hint=f"`adaptory runs cancel {run.name}` ends it.",
            run=run.id,
            trial=trial,
        )
    run = _as_it_is_now(run, store=store, db=db, jobs=jobs, settings=settings)
    progress = SweepProgress.of(run, repository.list_events(db, run.id))
    known = progress.names()
    if trial not in known:
        near = difflib.get_close_matches(trial, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"`adaptory sweep show {run.name}` names them."
        raise TrialNotFound(f"Sweep {run.name} has no trial {trial!r}.", hint=hint, run=run.id, trial=trial)
    if trial in progress.named and (state := progress.named[trial].state).over:
        raise TrialError(
            f"Trial {trial} of sweep {run.name} is {state.value} already.",
            hint=f"`adaptory sweep show {run.name}` says what runs.",
            run=run.id,
            trial=trial,
            state=state.value,
        )
    if not run.state.active:
        raise IllegalTransition(
            f"Sweep {run.name} {run.state.words}: none of its trials runs.", run=run.id, state=run.state.value
        )
    with leases.holding(db, f"stop-trials:{run.id}", wait=30.0) as got:
        if not got:
            raise TrialError(f"Somebody else is stopping trials of {run.name} now.", hint="Try again.", run=run.id)
        return ask_to_stop(store_of(run, store), run.id, trial)


def cancel(
    run: Run,
    *,
    settings: Settings,
    store: Store,
    db: Database,
    jobs: JobClient | None,
    say: Say = quiet,
    timeout: float = 15.0,
    poll: float = 0.5,
) -> Run:
    """End a run for good (`resume` can still take it up again), and wait until its job is off the cluster.

    Args:
        timeout: seconds to wait for the job's end; what is still there then is stopped by reconciliation.

    Raises:
        IllegalTransition: the run is finished already.
    """
    run = _as_it_is_now(run, store=store, db=db, jobs=jobs, settings=settings)
    run = _mark_cancelled(db, run)
    attempts = repository.open_attempts(db, run_id=run.id)
    for attempt in attempts if run.resolved else ():
        _stop(store_of(run, store), jobs if run.ray_address == settings.ray_address else None, attempt, say)
    deadline = time.monotonic() + timeout
    while jobs is not None and repository.open_attempts(db, run_id=run.id) and time.monotonic() < deadline:
        report = reconcile(
            db, store, jobs, ray_address=settings.ray_address, keys=Keys.of(settings), run_id=run.id, wait=5.0
        )
        if report.warnings or not repository.open_attempts(db, run_id=run.id):
            break
        time.sleep(poll)
    return get_run(db, run.id)


# --- details --------------------------------------------------------------------------------------------------------


def refuse_credentials(store: Store) -> None:
    """The store's URL is shown in Ray's dashboard and kept with the run, so it must not carry a password."""
    if urlsplit(store.url).username:
        raise SettingsError(
            f"ADAPTORY_STORE_URL holds credentials for {urlsplit(store.url).hostname}.",
            hint="Put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, here and on the cluster's nodes.",
        )


def git_commit(directory: Path | None = None) -> str | None:
    """The commit that is checked out in `directory` (default: the current one), `-dirty` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Of what decides whether a job can be understood on the other side; reads metadata, imports nothing."""
    found = {"python": platform.python_version(), "adaptory": orchestrator.__version__}
    for package in ("ray", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _absolute(reference: str) -> str:
    """A local path as the job, which starts in another directory, can open it; anything else unchanged."""
    path = Path(reference).expanduser()
    return str(path.absolute()) if "://" not in reference and path.exists() else reference


def _send(db: Database, store: Store, jobs: JobClient, run: Run) -> Run:
    try:
        return launch(db, store, jobs, run)
    except ClusterError as error:
        hint = (
            f"{error.hint or 'Look at the cluster.'} Run {run.name} stays queued and is sent once the cluster answers; "
        )
        raise type(error)(
            error.message, hint=f"{hint}`adaptory runs cancel {run.name}` drops it.", run=run.id
        ) from error


def _as_it_is_now(run: Run, *, settings: Settings, store: Store, db: Database, jobs: JobClient | None) -> Run:
    reconcile(db, store, jobs, ray_address=settings.ray_address, keys=Keys.of(settings), run_id=run.id, wait=5.0)
    return get_run(db, run.id)


def _mark_cancelled(db: Database, run: Run) -> Run:
    while True:
        try:
            return transition(db, run, RunState.CANCELLED, message="The run was cancelled.")
        except IllegalTransition:
            now = get_run(db, run.id)
            if (now.state, now.attempt) == (run.state, run.attempt):
                raise
            run = now  # it moved, e.g. from queued to running: try again from there


def _stop(store: Store, jobs: JobClient | None, attempt: Attempt, say: Say) -> None:
    try:
        stop(store, jobs, attempt)
    except ClusterError as error:
        say(f"{error} The job was asked through the store to end, and does so by itself if it still runs.")
