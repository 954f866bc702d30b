"""Reconciliation: what the store and Ray say about a run becomes what the database says.

One pass goes over the attempts whose Ray job may still be alive. It only ever takes a fact from the store or from Ray and
records it in one transaction, or repeats a step that may be repeated: so it may be killed at any line and run twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from orchestrator.db import Database, leases
from orchestrator.errors import (
    AdapterError,
    AdaptoryError,
    ClusterError,
    CorruptObject,
    IllegalTransition,
    JobFailed,
    ObjectMissing,
    RunNotFound,
    StoreError,
)
from orchestrator.registry.signing import Keys
from orchestrator.runs import repository
from orchestrator.runs.client import JobClient, JobStatus
from orchestrator.runs.events import Event
from orchestrator.runs.launch import launch, request, store_of
from orchestrator.runs.repository import transition
from orchestrator.runs.result import RunResult, heard
from orchestrator.runs.run import AdapterRecord, Attempt, Run
from orchestrator.runs.segments import list_segments, read_segment
from orchestrator.runs.serving import serve
from orchestrator.runs.states import RunState
from orchestrator.store import Store, adapter_path, result_path

LOG_TAIL_LINES = 30
PROVENANCE = "provenance.json"


@dataclass
class ReconcileReport:
    changed: dict[str, RunState] = field(default_factory=dict)
    """Run id → its new state."""
    warnings: list[str] = field(default_factory=list)
    """What could not be seen, in sentences: a cluster or store that is away."""
    skipped: bool = False
    """Another process is reconciling now; what it finds is in the database when it is done."""


@dataclass(frozen=True)
class _Job:
    """What Ray says of an attempt."""

    status: JobStatus | None
    """None: it does not know it."""
    message: str = ""

    @property
    def over(self) -> bool:
        return self.status is None or self.status.final


def reconcile(
    db: Database,
    store: Store,
    jobs: JobClient | None,
    *,
    ray_address: str | None,
    keys: Keys,
    run_id: str | None = None,
    wait: float = 0.0,
) -> ReconcileReport:
    """One pass over all runs, or over one.

    Args:
        jobs: the cluster; None when none is up: then only the store is asked, and nothing is concluded from silence.
        ray_address: which cluster `jobs` is (`settings.ray_address`); runs that were sent elsewhere are not looked for there.
        keys: sign what runs have published.
        wait: seconds to wait for another process that reconciles.
    """
    report, clusters = ReconcileReport(), {ray_address: jobs}
    with leases.holding(db, "reconcile", wait=wait) as got:
        report.skipped = not got
        for attempt in repository.open_attempts(db, run_id=run_id) if got else ():
            try:
                run = repository.get_run(db, attempt.run_id)
                job = _ask(clusters, run, attempt, report)
                _reconcile(db, store_of(run, store), clusters.get(run.ray_address), keys, run, attempt, job)
                after = repository.get_run(db, attempt.run_id).state
                if after is not run.state:
                    report.changed[run.id] = after
            except (IllegalTransition, RunNotFound):
                pass  # a person moved or removed the run meanwhile: the next pass sees it as it is now
            except AdaptoryError as error:
                report.warnings.append(f"Run {attempt.run_id}: {error}")
    return report


def _reconcile(
    db: Database, store: Store, jobs: JobClient | None, keys: Keys, run: Run, attempt: Attempt, job: _Job | None
) -> None:
    """One attempt, whose job Ray was asked about *before* the store is read: a job that is over has written its result."""
    if run.resolved is None:
        return _give_up_unprepared(db, run, attempt)
    run = _ingest(db, store, run, attempt)
    result = _read_result(store, attempt)
    if attempt.number != run.attempt or run.settled:  # decided; what remains is that the job ends
        if job is not None and job.over:
            if attempt.number == run.attempt and run.state is RunState.SUCCEEDED and run.result is not None:
                serve(db, run, run.result)  # if the pass that finished it was killed
            repository.end_attempt(db, attempt)
        elif attempt.number != run.attempt or run.state is RunState.CANCELLED:
            stop(store, jobs, attempt)
    elif isinstance(result, RunResult):
        _finish(db, store, keys, run, attempt, result, over=job is not None and job.over)
    elif job is None or jobs is None or not job.over:
        return  # nothing new, or nobody to ask
    elif job.status is None and run.state is not RunState.RUNNING:
        launch(db, store, jobs, run)
    elif job.status is JobStatus.STOPPED:
        transition(db, run, RunState.CANCELLED, message="Ray stopped the job.", end_attempt=True)
    elif (printed := _printed_result(jobs, attempt, job)) is not None:
        _finish(db, store, keys, run, attempt, printed, over=True)
    else:
        error = _without_result(jobs, run, job, result)
        message = error.message.splitlines()[0]
        transition(db, run, RunState.FAILED, message=message, level="error", end_attempt=True, error=error.to_dict())


def stop(store: Store, jobs: JobClient | None, attempt: Attempt) -> None:
    """Make an attempt end: it sees the request by itself within a second or so, and Ray kills what does not."""
    try:
        request(store, attempt.run_id, attempt.number, "cancel")
    except StoreError:
        if jobs is None:
            raise  # nobody else to ask; a full disk must not keep alive what Ray can end
    if jobs is not None:
        jobs.stop(attempt.submission_id)


# --- details --------------------------------------------------------------------------------------------------------


def _ask(
    clusters: dict[str | None, JobClient | None], run: Run, attempt: Attempt, report: ReconcileReport
) -> _Job | None:
    """What Ray says of the attempt; None when it cannot be asked."""
    if run.ray_address not in clusters and not run.settled:
        place = f"on {run.ray_address}" if run.ray_address else "on the local Ray"
        report.warnings.append(f"Run {run.name} is {place}: set ADAPTORY_RAY_ADDRESS accordingly to watch it.")
    jobs = clusters.get(run.ray_address)
    if jobs is None or run.resolved is None:
        return None
    try:
        found = jobs.status(attempt.submission_id)
    except ClusterError as error:
        report.warnings.append(str(error))
        clusters[run.ray_address] = None  # one that is away is asked once a pass
        return None
    return _Job(*found) if found else _Job(None)


def _give_up_unprepared(db: Database, run: Run, attempt: Attempt) -> None:
    """A run whose data is not in the store yet, if the process that was to bring it is gone."""
    if run.settled:
        return repository.end_attempt(db, attempt)
    if leases.held(db, repository.submission_lease(run.id)):
        return
    error = JobFailed(
        f"Submitting run {run.name} broke off before its data was in the store.",
        hint="Nothing was started, and the name is free: submit it again.",
        run=run.id,
    )
    transition(db, run, RunState.FAILED, message=error.message, level="error", end_attempt=True, error=error.to_dict())


def _ingest(db: Database, store: Store, run: Run, attempt: Attempt) -> Run:
    """Take over new event segments; the job's first `running` makes the run that."""
    paths = [p for listed in list_segments(store, run.id, "events", attempt=attempt.number).values() for p in listed]
    if paths:
        known = repository.ingested_segments(db, run.id)
        new = [path for path in paths if path not in known]
        events = [event for path in new for event in read_segment(store, path, Event)]
        repository.ingest_events(db, run.id, events, new)
    if attempt.number == run.attempt and run.state in (RunState.VALIDATING_FILES, RunState.QUEUED):
        began = repository.began_at(db, run)  # from the database: a kill right after ingesting must not lose it
        if began is not None:
            return transition(db, run, RunState.RUNNING, started_at=run.started_at or began)
    return run


def _read_result(store: Store, attempt: Attempt) -> RunResult | CorruptObject | None:
    """The attempt's own last word; what an older or newer attempt wrote is none."""
    try:
        result = RunResult.model_validate(store.read_json(result_path(attempt.run_id)))
    except ObjectMissing:
        return None
    except (CorruptObject, ValidationError) as error:
        said = str(error).splitlines()[0]
        return CorruptObject(f"{store.url}/{result_path(attempt.run_id)} cannot be read: {said}")
    if result.attempt != attempt.number:
        return None
    if not _is_end(result):
        return CorruptObject(f"{store.url}/{result_path(attempt.run_id)} says {result.state.value}, which is no end.")
    return result


def _printed_result(jobs: JobClient, attempt: Attempt, job: _Job) -> RunResult | None:
    """The last word of an attempt whose store did not take it: a disk that is full, or a bucket that was away."""
    if job.status is None:
        return None
    try:
        result = heard(jobs.logs(attempt.submission_id), attempt.number)
    except ClusterError:
        return None
    return result if result is not None and _is_end(result) else None


def _is_end(result: RunResult) -> bool:
    return result.state.final or result.state is RunState.PAUSED


def _finish(
    db: Database, store: Store, keys: Keys, run: Run, attempt: Attempt, result: RunResult, *, over: bool
) -> None:
    finished = result.finished_at if result.state.final else None
    published = result.adapter if result.state is RunState.SUCCEEDED else None
    problem = _sign(db, store, keys, published) if published else None
    message = f"The run {result.state.words}." if result.error is None else str(result.error.get("message"))
    serves = published is not None and run.spec.get("serve") is not None
    run = transition(
        db,
        run,
        result.state,
        message=f"{message} Its adapter cannot be used: {problem}" if problem else message,
        level="error" if problem or result.state is RunState.FAILED else "info",
        end_attempt=over and not serves,
        record=_adapter_record(store, run, result) if published else None,
        register=problem is None,
        result=result.model_dump(mode="json"),
        error=result.error,
        finished_at=finished,
        adapter=result.adapter,
    )
    if serves:
        serve(db, run, result)
        if over:
            repository.end_attempt(db, attempt)


def _sign(db: Database, store: Store, keys: Keys, digest: str) -> str | None:
    """Sign what the run published; why not, if it is not what it should be. The run has succeeded even then: its
    checkpoints are there, and what it published is kept to be looked at.

    Raises:
        AdaptoryError: it could not be asked now; the next pass does it.
    """
    from orchestrator.registry.intake import take_in  # imports numpy, which no pass but this one needs

    try:
        take_in(db, store, digest, keys)
    except (AdapterError, CorruptObject, ObjectMissing) as error:
        return error.message
    return None


def _adapter_record(store: Store, run: Run, result: RunResult) -> AdapterRecord | None:
    """From the result, and from the metadata with which the adapter was published."""
    if result.adapter is None:
        return None
    published = _published(store, result.adapter)
    return AdapterRecord(
        tenant=run.tenant,
        digest=result.adapter,
        name=run.name,
        run_id=run.id,
        base_digest=published.get("base_digest"),
        rank=published.get("rank"),
        created_at=result.finished_at,
        metrics=result.metrics | (result.evaluation.after if result.evaluation else {}),
        provenance=published,
    )


def _published(store: Store, digest: str) -> dict[str, Any]:
    """What was published with the adapter: its manifest's summary and its provenance. Damage is for `verify` to tell."""
    try:
        manifest = store.manifest(adapter_path(digest))
        if manifest is None or PROVENANCE not in manifest.files:
            return dict(manifest.metadata) if manifest else {}
        return {**store.read_json(f"{adapter_path(digest)}/{PROVENANCE}"), **manifest.metadata}
    except (CorruptObject, ObjectMissing):
        return {}


def _without_result(jobs: JobClient, run: Run, job: _Job, result: CorruptObject | None) -> JobFailed:
    """Why a run is failed whose job is over and left no result: in Ray's words, with the end of what it printed."""
    try:
        tail = jobs.logs(run.submission_id).splitlines()[-LOG_TAIL_LINES:] if job.status else []
    except ClusterError:
        tail = []
    if job.status is None:
        said = "Ray does not know its job any more: the cluster was stopped or lost its head"
    else:
        reason = (job.message.strip() or "no reason given").splitlines()[0]
        reason = reason.split(", last available logs")[0]  # Ray repeats the log in its message; the tail has it
        words = [line.strip() for line in tail if line.strip()][-1:]
        said = f"Ray says {job.status.value}: {reason.rstrip('.')}" + "".join(
            f"; its last words: {line}" for line in words
        )
    if result is not None:
        said = f"{result.message} {said}"
    return JobFailed(
        f"Run {run.name} ended without a result. {said.rstrip('.')}.",
        hint=f"`adaptory runs logs {run.name}` shows what it printed; `adaptory runs resume {run.name}` continues it.",
        run=run.id,
        ray_status=job.status.value if job.status else None,
        log="\n".join(tail),
    )
