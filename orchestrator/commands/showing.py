"""Runs as tables and as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.commands.following import Progress, before_after, line
from orchestrator.commands.output import console, duration, fields, listing, moment, number, say, short_moment, table
from orchestrator.errors import UsageError
from orchestrator.runs.states import RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.commands.backend import Backend
    from orchestrator.runs.events import Event
    from orchestrator.runs.logs import LogLine
    from orchestrator.runs.run import Attempt, Run

_COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan", "cancelled": "dim", "paused": "yellow"}
_POLL_SECONDS = 1.0


def state(word: str) -> RunState:
    """The state that a person typed.

    Raises:
        UsageError: there is no such state.
    """
    try:
        return RunState(word.lower())
    except ValueError as error:
        hint = f"States are {', '.join(known.value for known in RunState)}."
        raise UsageError(f"{word!r} is no state of a run.", hint=hint, value=word) from error


def summary(run: Run) -> dict[str, Any]:
    """A run's facts for machines, without its specs and result."""
    kept = run.model_dump(mode="json", exclude={"spec", "resolved", "job_env", "result"})
    return {**kept, "base_model": run.spec.get("base_model")}


def details(run: Run, attempts: Sequence[Attempt], events: Sequence[Event]) -> dict[str, Any]:
    """All that is known of a run, for machines."""
    progress = _progress(events)
    return {
        **summary(run),
        "spec": run.spec,
        "resolved": run.resolved,
        "result": run.result.model_dump(mode="json") if run.result else None,
        "attempts": [attempt.model_dump(mode="json") for attempt in attempts],
        "progress": progress.__dict__ if events else None,
    }


def show_list(runs: Sequence[Run]) -> None:
    out = console()
    if not runs:
        say("There are no runs. Start one: adaptory run jobs/examples/finance-entities.yaml --follow")
        return
    tenants = len({run.tenant for run in runs}) > 1
    columns = [*(["tenant"] if tenants else []), "name", "state", "base model", "created", "took", "adapter"]
    rows = []
    for run in runs:
        cells = [run.name, _state(run), str(run.spec.get("base_model")), short_moment(run.created_at)]
        rows.append([*([run.tenant] if tenants else []), *cells, duration(_seconds(run)), short(run.adapter)])
    drop = ("took", "base model", "created", "adapter")
    out.print(listing(columns, rows, width=out.width, right=("took",), narrow=("base model",), drop=drop))


def show_run(run: Run, attempts: Sequence[Attempt], events: Sequence[Event]) -> None:
    out, progress, tuning = console(), _progress(events), run.spec.get("tuning", {})
    rows: list[tuple[str, Any]] = [
        ("state", _state(run)),
        ("id", run.id),
        ("tenant", run.tenant),
        ("base model", run.spec.get("base_model")),
        ("tuning", _tuning(tuning)),
        ("cluster", run.ray_address or "local Ray"),
        ("created", moment(run.created_at)),
        ("started", moment(run.started_at)),
        ("finished", moment(run.finished_at)),
        ("took", duration(_seconds(run))),
        ("progress", _words(progress)),
        *_sweep(run, events),
        ("adapter", run.adapter),
        ("error", (run.error or {}).get("message")),
        ("what to do", (run.error or {}).get("hint")),
    ]
    out.print(fields(rows, title=f"Run {run.name}"))
    if run.result and run.result.metrics:
        out.print()
        out.print(fields([(name, number(value)) for name, value in run.result.metrics.items()], title="Metrics"))
    if run.result and run.result.evaluation:
        out.print()
        out.print(before_after(run.result.evaluation))
    if run.result and run.result.seconds:
        out.print()
        out.print(fields([(name, f"{value:.1f}") for name, value in run.result.seconds.items()], title="Seconds"))
    if len(attempts) > 1:
        result = table("attempt", "state", "began", "Ray job", title="Attempts")
        for attempt in attempts:
            result.add_row(str(attempt.number), attempt.state.value, moment(attempt.created_at), attempt.submission_id)
        out.print()
        out.print(result)


def short(digest: str | None) -> str:
    """A digest's first twelve characters: enough to name it."""
    return digest.removeprefix("sha256:")[:12] if digest else ""


def event_text(event: Event) -> str:
    mark = {"warn": "warning: ", "error": "error: "}.get(event.level, "")
    return f"{moment(event.created_at)}  {event.type:<8}  {mark}{line(event)}"


# --- logs -----------------------------------------------------------------------------------------------------------


def log_lines(backend: Backend, run: Run, attempt: int | None, *, follow: bool) -> Iterator[LogLine]:
    """What the run's processes logged; with `follow`, until it is settled. A job that died before it could log at all
    left its words with Ray."""
    from orchestrator.runs.logs import printed_lines, read_logs
    from orchestrator.runs.repository import get_run

    seen: set[str] = set()
    while True:
        settled = run.settled  # asked before reading: what is written until then is read
        yield from read_logs(backend.store, run.id, attempt=attempt, seen=seen)
        if not follow or settled:
            break
        time.sleep(_POLL_SECONDS)
        backend.reconcile()
        run = get_run(backend.db, run.id)
    if not seen and backend.jobs_if_running is not None:
        submission = f"{run.id}-a{attempt or run.attempt}"
        yield from printed_lines(backend.jobs_if_running.logs(submission), since=run.started_at or run.created_at)


def log_text(entry: LogLine) -> str:
    return f"{moment(entry.time)}  {entry.writer:<8}  {entry.level:<7}  {entry.message}"


# --- details --------------------------------------------------------------------------------------------------------


def _progress(events: Sequence[Event]) -> Progress:
    progress = Progress()
    for event in events:
        progress.take(event)
    return progress


def _words(progress: Progress) -> str:
    counted = f" {number(progress.done)}/{number(progress.total)}" if progress.total else ""
    steps = f", step {progress.step}" + (f"/{progress.total_steps}" if progress.total_steps else "")
    return " · ".join(
        part for part in (progress.phase + (counted or (steps if progress.step else "")), progress.figures()) if part
    )


def _tuning(tuning: dict[str, Any]) -> str:
    """`lora, rank 8, alpha 16`"""
    figures = [f"{name} {number(tuning[name])}" for name in ("rank", "alpha") if name in tuning]
    return ", ".join([str(tuning.get("type", "")), *figures])


def _sweep(run: Run, events: Sequence[Event]) -> list[tuple[str, Any]]:
    """Of a sweep: how many trials it has, and the best."""
    if not run.sweeps:
        return []
    from orchestrator.commands import showing_sweeps
    from orchestrator.runs.sweeps import SweepProgress

    progress = SweepProgress.of(run, events)
    return [
        ("trials", showing_sweeps.counted(progress)),
        ("winner" if run.state is RunState.SUCCEEDED else "best", showing_sweeps.best(progress)),
        ("look", f"adaptory sweep show {run.name}"),
    ]


def _state(run: Run) -> Any:
    from rich.text import Text

    return Text(run.state.value, style=_COLOURS.get(run.state.value, ""))


def _seconds(run: Run) -> float | None:
    if run.started_at is None:
        return None
    return (run.finished_at or time.time()) - run.started_at
