"""Runs, attempts, events and adapters in the database. Every function is one transaction; none waits for a network."""

from __future__ import annotations

import difflib
import secrets
import time
from collections.abc import Collection, Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, delete, not_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.db import Database, leases
from orchestrator.db.inserts import insert_or_ignore
from orchestrator.db.models import AdapterRow, AttemptRow, EventRow, RunRow, SegmentRow, TenantRow
from orchestrator.errors import IllegalTransition, RunExists, RunNotFound
from orchestrator.registry import versions
from orchestrator.runs.events import Event
from orchestrator.runs.run import AdapterRecord, Attempt, Run
from orchestrator.runs.states import RunState
from orchestrator.spec.job import JobSpec

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"  # base32, in lower case
_NAME_LENGTH = 63


def submission_id(run_id: str, attempt: int) -> str:
    return f"{run_id}-a{attempt}"


def submission_lease(run_id: str) -> str:
    """Held while a process puts the run's data into the store; when it expires, that process is gone."""
    return f"submit:{run_id}"


# --- runs -----------------------------------------------------------------------------------------------------------


def refuse_taken_name(db: Database, spec: JobSpec) -> None:
    """Refuse early what `create_run` would refuse; only that one decides between two who submit at once.

    Raises:
        RunExists: the tenant has a run of this name.
    """
    with db.read() as session:
        taken = session.scalar(select(RunRow.id).where(*_named(spec), not_(_BROKEN_OFF)))
    if taken is not None:
        raise _name_taken(db, spec)


def create_run(db: Database, spec: JobSpec, *, ray_address: str | None = None, holder: str | None = None) -> Run:
    """A new run in `validating_files`, first attempt, with its submission lease taken by `holder`.

    A run of that name whose submission broke off before anything was started is replaced.

    Raises:
        RunExists: the tenant has a run of this name.
    """
    run_id, now = f"{spec.name}-{''.join(secrets.choice(_ALPHABET) for _ in range(6))}", time.time()
    try:
        with db.write() as session:
            session.execute(insert_or_ignore(session, TenantRow).values(name=spec.tenant, created_at=now))
            session.execute(delete(RunRow).where(*_named(spec), _BROKEN_OFF))
            row = RunRow(
                id=run_id,
                tenant=spec.tenant,
                name=spec.name,
                state=RunState.VALIDATING_FILES,
                attempt=1,
                spec=spec.model_dump(mode="json"),
                submission_id=submission_id(run_id, 1),
                ray_address=ray_address,
                created_at=now,
            )
            session.add(row)
            session.flush()
            session.add(_attempt(row, now))
            _note(session, row, "The run was created.")
            leases.take(session, submission_lease(run_id), holder or leases.new_holder())
            return Run.model_validate(row)
    except IntegrityError as error:
        raise _name_taken(db, spec) from error


def save_resolved(db: Database, run: Run, resolved: dict[str, Any], job_env: dict[str, str]) -> Run:
    """Keep what a job needs; from here on the run survives the process that submitted it.

    Raises:
        IllegalTransition: the run was cancelled, or has already left `validating_files`.
    """
    with db.write() as session:
        return _swap(session, run, RunState.VALIDATING_FILES, resolved=resolved, job_env=job_env)


def remove_run(db: Database, run: Run) -> None:
    """Forget a run that was never prepared, so that its name is free; a run that got further stays."""
    with db.write() as session:
        unprepared = (RunRow.state == RunState.VALIDATING_FILES, RunRow.resolved.is_(None))
        session.execute(delete(RunRow).where(RunRow.id == run.id, *unprepared))


def get_run(db: Database, reference: str, *, tenant: str | None = None) -> Run:
    """The run with this id, or with this name among the tenant's (any tenant's when None).

    Raises:
        RunNotFound: none or several have it; names the nearest.
    """
    with db.read() as session:
        query = _of_tenant(select(RunRow), tenant)
        row = session.scalar(query.where(RunRow.id == reference))
        rows = [row] if row else session.scalars(query.where(RunRow.name == reference)).all()
        if len(rows) == 1:
            return Run.model_validate(rows[0])
        if rows:
            ids = ", ".join(f"{row.id} (tenant {row.tenant})" for row in rows)
            raise RunNotFound(f"Several tenants have a run {reference!r}.", hint=f"Use its id: {ids}.", run=reference)
        names = session.scalars(_of_tenant(select(RunRow.name), tenant)).all()
    near = difflib.get_close_matches(reference, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`adaptory runs list` shows all."
    raise RunNotFound(f"There is no run {reference!r}.", hint=hint, run=reference)


def list_runs(
    db: Database, *, tenant: str | None = None, states: Collection[RunState] | None = None, limit: int | None = None
) -> list[Run]:
    """Newest first."""
    query = _of_tenant(select(RunRow), tenant).order_by(RunRow.created_at.desc(), RunRow.id)
    if states is not None:
        query = query.where(RunRow.state.in_(states))
    with db.read() as session:
        return [Run.model_validate(row) for row in session.scalars(query.limit(limit))]


def transition(
    db: Database,
    run: Run,
    to: RunState,
    *,
    message: str | None = None,
    level: Literal["info", "warn", "error"] = "info",
    end_attempt: bool = False,
    record: AdapterRecord | None = None,
    register: bool = False,
    **changes: Any,
) -> Run:
    """Bring a run from the state in which `run` was read to another, by compare-and-swap on state and attempt.

    Args:
        message: when given, an event says it.
        end_attempt: also note that the attempt's job is over.
        record: also keep what the run published; one that is known already is left as it is.
        register: and make it the next version of the run's name, which it must be signed for.
        **changes: further columns.

    Raises:
        IllegalTransition: not allowed from there, or somebody else has moved the run meanwhile.
    """
    if not run.state.may_become(to):
        raise _illegal(run, to)
    if to.final:
        changes.setdefault("finished_at", time.time())
    with db.write() as session:
        moved = _swap(session, run, to, **changes)
        session.execute(
            _this_attempt(run).values(state=to, **({"ended_at": time.time()} if end_attempt else {})),
        )
        if record is not None:
            session.execute(insert_or_ignore(session, AdapterRow).values(**record.model_dump()))
            if register:
                who = f"run {record.run_id}"
                versions.register(session, record.tenant, record.name, record.digest, actor=who, run_id=record.run_id)
        if message is not None:
            _note(session, moved, message, level)
        return moved


def begin_attempt(db: Database, run: Run, *, job_env: dict[str, str], ray_address: str | None) -> Run:
    """Queue a paused, failed or cancelled run again, as its next attempt; older attempts are fenced off from here on.

    Raises:
        IllegalTransition: the run is active or has succeeded, or somebody else was quicker.
    """
    if not run.state.may_become(RunState.QUEUED) or run.state is RunState.VALIDATING_FILES:
        raise _illegal(run, RunState.QUEUED)
    number = run.attempt + 1
    with db.write() as session:
        moved = _swap(
            session,
            run,
            RunState.QUEUED,
            attempt=number,
            submission_id=submission_id(run.id, number),
            job_env=job_env,
            ray_address=ray_address,
            error=None,
            result=None,
            finished_at=None,
        )
        session.add(_attempt(moved, time.time()))
        _note(session, moved, f"Attempt {number} is queued.")
        return moved


def list_attempts(db: Database, run_id: str) -> list[Attempt]:
    with db.read() as session:
        rows = session.scalars(select(AttemptRow).where(AttemptRow.run_id == run_id).order_by(AttemptRow.number))
        return [Attempt.model_validate(row) for row in rows]


def open_attempts(db: Database, *, run_id: str | None = None) -> list[Attempt]:
    """Attempts whose Ray job may still be alive, oldest first."""
    query = select(AttemptRow).where(AttemptRow.ended_at.is_(None)).order_by(AttemptRow.created_at)
    if run_id is not None:
        query = query.where(AttemptRow.run_id == run_id)
    with db.read() as session:
        return [Attempt.model_validate(row) for row in session.scalars(query)]


def end_attempt(db: Database, attempt: Attempt) -> None:
    with db.write() as session:
        session.execute(
            update(AttemptRow)
            .where(
                AttemptRow.run_id == attempt.run_id, AttemptRow.number == attempt.number, AttemptRow.ended_at.is_(None)
            )
            .values(ended_at=time.time())
        )


# --- events ---------------------------------------------------------------------------------------------------------


def list_events(db: Database, run_id: str, *, after: str | None = None, limit: int | None = None) -> list[Event]:
    """Events of a run in order of arrival: all, or those after the event with id `after`."""
    query = select(EventRow).where(EventRow.run_id == run_id).order_by(EventRow.seq)
    if after is not None:
        seen = select(EventRow.seq).where(EventRow.run_id == run_id, EventRow.event_id == after)
        query = query.where(EventRow.seq > seen.scalar_subquery())
    with db.read() as session:
        return [
            Event(
                id=row.event_id,
                created_at=row.created_at,
                type=row.type,
                level=row.level,
                message=row.message,
                data=row.data,
            )
            for row in session.scalars(query.limit(limit))
        ]


def note(db: Database, run: Run, step: str, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
    """An event of the control plane's own, one per attempt and step: what was said first stands."""
    with db.write() as session:
        _say(session, run, step, message, level)


def noted(db: Database, run: Run, step: str) -> bool:
    with db.read() as session:
        query = select(EventRow.event_id).where(EventRow.run_id == run.id, EventRow.event_id == _control(run, step))
        return session.scalar(query) is not None


def began_at(db: Database, run: Run) -> float | None:
    """When the present attempt's job said that it is running; None when it has not."""
    query = select(EventRow).where(
        EventRow.run_id == run.id, EventRow.type == "state", EventRow.event_id.startswith(f"a{run.attempt}-")
    )
    with db.read() as session:
        said = [row.created_at for row in session.scalars(query) if row.data.get("state") == RunState.RUNNING.value]
    return min(said, default=None)


def ingested_segments(db: Database, run_id: str) -> set[str]:
    with db.read() as session:
        return set(session.scalars(select(SegmentRow.path).where(SegmentRow.run_id == run_id)))


def ingest_events(db: Database, run_id: str, events: Sequence[Event], segments: Collection[str]) -> None:
    """Store events and the segments that they came from, together; those that are there already are left alone."""
    with db.write() as session:
        if events:
            rows = [_event_values(run_id, event) for event in sorted(events, key=lambda event: event.created_at)]
            session.execute(insert_or_ignore(session, EventRow), rows)
        if segments:
            session.execute(
                insert_or_ignore(session, SegmentRow), [{"run_id": run_id, "path": path} for path in segments]
            )


# --- adapters -------------------------------------------------------------------------------------------------------


def list_adapters(db: Database, *, tenant: str | None = None) -> list[AdapterRecord]:
    """Newest first."""
    query = select(AdapterRow).order_by(AdapterRow.created_at.desc())
    if tenant is not None:
        query = query.where(AdapterRow.tenant == tenant)
    with db.read() as session:
        return [AdapterRecord.model_validate(row) for row in session.scalars(query)]


# --- details --------------------------------------------------------------------------------------------------------


_BROKEN_OFF = and_(RunRow.state.in_((RunState.FAILED, RunState.CANCELLED)), RunRow.resolved.is_(None))
"""A run whose submission ended before anything was started; its name is free."""


def _named(spec: JobSpec) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return RunRow.tenant == spec.tenant, RunRow.name == spec.name


def _of_tenant(query: Select[Any], tenant: str | None) -> Select[Any]:
    return query if tenant is None else query.where(RunRow.tenant == tenant)


def _swap(session: Session, run: Run, to: RunState, **changes: Any) -> Run:
    where = (RunRow.id == run.id, RunRow.state == run.state, RunRow.attempt == run.attempt)
    row = session.scalar(update(RunRow).where(*where).values(state=to, **changes).returning(RunRow))
    if row is None:
        now = session.get(RunRow, run.id)
        raise _illegal(Run.model_validate(now) if now else run, to, gone=now is None)
    return Run.model_validate(row)


def _this_attempt(run: Run) -> Any:
    return update(AttemptRow).where(AttemptRow.run_id == run.id, AttemptRow.number == run.attempt)


def _attempt(run: Run | RunRow, now: float) -> AttemptRow:
    return AttemptRow(
        run_id=run.id, number=run.attempt, submission_id=run.submission_id, state=run.state, created_at=now
    )


def _note(session: Session, run: Run | RunRow, message: str, level: Literal["info", "warn", "error"] = "info") -> None:
    """An event of the control plane's own, one per attempt and state."""
    _say(session, run, run.state.value, message, level)


def _control(run: Run | RunRow, step: str) -> str:
    return f"a{run.attempt}-control-{step}"


def _say(session: Session, run: Run | RunRow, step: str, message: str, level: Literal["info", "warn", "error"]) -> None:
    data = {"state": run.state.value}
    event = Event(id=_control(run, step), created_at=time.time(), type="state", level=level, message=message, data=data)
    session.execute(insert_or_ignore(session, EventRow), [_event_values(run.id, event)])


def _event_values(run_id: str, event: Event) -> dict[str, Any]:
    return {"run_id": run_id, "event_id": event.id, **event.model_dump(mode="json", exclude={"id"})}


def _illegal(run: Run, to: RunState, *, gone: bool = False) -> IllegalTransition:
    hints = {
        RunState.SUCCEEDED: "It is finished; submit a new run.",
        RunState.FAILED: f"`adaptory runs resume {run.name}` continues it from its last checkpoint, if it has one.",
        RunState.CANCELLED: f"`adaptory runs resume {run.name}` continues it from its last checkpoint, if it has one.",
        RunState.PAUSED: f"`adaptory runs resume {run.name}` continues it.",
    }
    if gone:
        return IllegalTransition(f"Run {run.id} does not exist any more.", run=run.id)
    hint = hints.get(run.state, f"`adaptory runs show {run.name}` says how far it is; pause or cancel it first.")
    if run.state is to:
        hint = "" if to is RunState.QUEUED else hint
        return IllegalTransition(f"Run {run.name} {to.words} already.", hint=hint, run=run.id, state=to.value)
    return IllegalTransition(
        f"Run {run.name} {run.state.words}, so it cannot be{'come' if to is RunState.RUNNING else ''} {to.value}.",
        hint=hint,
        run=run.id,
        state=run.state.value,
    )


def _name_taken(db: Database, spec: JobSpec) -> RunExists:
    with db.read() as session:
        names = set(session.scalars(_of_tenant(select(RunRow.name), spec.tenant)))
        row = session.scalar(select(RunRow).where(*_named(spec)))
    state = row.state.value if row else "gone again"
    resumable = row is not None and row.state in (RunState.PAUSED, RunState.FAILED, RunState.CANCELLED)
    resume = f", or continue it: `adaptory runs resume {spec.name}`" if resumable else ""
    ends = (f"-{n}" for n in range(2, len(names) + 3))
    free = next(name for end in ends if (name := spec.name[: _NAME_LENGTH - len(end)].rstrip("-") + end) not in names)
    return RunExists(
        f"Tenant {spec.tenant} already has a run {spec.name!r}; it is {state}.",
        hint=f"Choose another name, such as `--name {free}`{resume}.",
        run=row.id if row else None,
        state=state,
        suggestion=free,
    )
