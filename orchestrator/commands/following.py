"""A run as it happens: a progress bar on a terminal, plain lines elsewhere, and what it came to at its end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.commands.output import console, duration, fields, number, say, table
from orchestrator.errors import AdaptoryError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.runs.events import Event
    from orchestrator.runs.result import EvaluationResult
    from orchestrator.runs.run import Run

_STEPS_BETWEEN_LINES = 10
_SECONDS_BETWEEN_LINES = 5.0
_LOG_LINES = 12
_ROOMY = 110
"""Columns from which on the figures leave room for a long bar."""


@dataclass
class Progress:
    """Where a run is, put together from its events."""

    phase: str = ""
    """What goes on; empty until the job says so."""
    done: float = 0
    total: float | None = None
    """Of the phase: optimiser steps while training, else what the phase counts."""
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    def take(self, event: Event) -> None:
        data = event.data
        if event.type == "phase":
            self.phase, self.done, self.total = str(data.get("phase") or event.message), 0, None
        elif event.type == "progress":
            self.phase = str(data.get("phase", self.phase))
            self.done, self.total = data.get("done", self.done), data.get("total", self.total)
        elif event.type == "metrics":
            for name in ("step", "total_steps", "loss", "validation_loss", "tokens_per_second", "seconds_left"):
                if data.get(name) is not None:
                    setattr(self, name, data[name])
            if "loss" in data:
                self.done, self.total = self.step, self.total_steps or self.total

    def figures(self) -> str:
        """`loss 0.412 · validation 0.388 · 212 tokens/s · 1 min 20 s left`, of what is known."""
        parts = [
            f"loss {_loss(self.loss)}" if self.loss is not None else "",
            f"validation {_loss(self.validation_loss)}" if self.validation_loss is not None else "",
            f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second is not None else "",
            f"{duration(self.seconds_left)} left" if self.seconds_left is not None else "",
        ]
        return " · ".join(part for part in parts if part)


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else number(value)


def line(event: Event) -> str:
    """An event in words, without its time."""
    data = event.data
    if event.type == "metrics":
        left = {name: value for name, value in data.items() if name not in ("step", "total_steps", "seconds_left")}
        of = f"/{data['total_steps']}" if data.get("total_steps") else ""
        figures = ", ".join(f"{name} {number(value)}" for name, value in left.items() if value is not None)
        return ": ".join(filter(None, (f"step {data.get('step', '?')}{of}", figures)))
    if event.type == "progress":
        of = f"/{number(data['total'])}" if data.get("total") else ""
        return f"{data.get('phase', '')} {number(data.get('done', 0))}{of}"
    if event.type == "phase":
        return event.message or f"{data.get('phase', '')} begins"
    if event.type == "trial":
        return _of_trial(data, event.message)
    if event.type == "sweep":
        return event.message or ", ".join(f"{name} {_plainly(value)}" for name, value in data.items())
    return event.message or f"state {data.get('state', '')}"


def _of_trial(data: dict[str, Any], message: str) -> str:
    """`t03 running: step 4/8, loss 0.5`"""
    of = f"/{data['total_steps']}" if data.get("total_steps") else ""
    names = ("epoch", "loss", "validation_loss", "learning_rate", "tokens")
    figures = [f"step {data['step']}{of}"] if data.get("step") is not None else []
    figures += [f"{name} {number(data[name])}" for name in names if data.get(name) is not None]
    if isinstance(metrics := data.get("metrics"), dict):
        figures += [f"{name} {_plainly(value)}" for name, value in metrics.items()]
    said = ", ".join(filter(None, [*figures, str(data.get("message") or message)]))
    return f"{data.get('trial', '')} {data.get('state', '')}".rstrip() + (f": {said}" if said else "")


def _plainly(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plainly(part)}" for name, part in value.items())
    return number(value)


def show_events(events: Iterable[Event | None]) -> None:
    """Render events until there are no more: a bar with lines above it on a terminal, else plain lines.

    None among them means that nothing is new.
    """
    out = console()
    (_bar if out.is_terminal else _plain)(events, out)


def _bar(events: Iterable[Event | None], out: Console) -> None:
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    state = Progress()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24 if out.width >= _ROOMY else 8),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[figures]}", style="cyan"),
        *([TimeElapsedColumn()] if out.width >= _ROOMY else []),
    )
    with Bar(*columns, console=out, transient=True) as bar:
        task = bar.add_task(_WAITING, total=None, count="", figures="")
        for event in events:
            if event is None:
                continue
            state.take(event)
            if event.type in ("message", "phase") or event.level != "info":
                bar.console.print(stamped(event), style=STYLES.get(event.level, ""))
            count = f"{number(state.done)}/{number(state.total)}" if state.total else ""
            bar.update(
                task,
                description=state.phase or _WAITING,
                completed=state.done,
                total=state.total,
                count=count,
                figures=state.figures(),
            )


def _plain(events: Iterable[Event | None], out: Console) -> None:
    """Each message and phase, and the figures every ten steps or five seconds, by the job's own clock."""
    state, said_at = Progress(), 0.0
    for event in events:
        if event is None:
            continue
        state.take(event)
        if event.type in ("message", "phase", "state") or event.level != "info":
            out.print(stamped(event), style=STYLES.get(event.level, ""), soft_wrap=True)
            continue
        late = event.created_at - said_at >= _SECONDS_BETWEEN_LINES
        if event.type == "progress":
            if late or state.done == state.total:
                out.print(stamped(event), soft_wrap=True)
                said_at = event.created_at
        elif (
            late
            or "validation_loss" in event.data
            or not state.step % _STEPS_BETWEEN_LINES
            or state.done == state.total
        ):
            of = f"/{state.total_steps}" if state.total_steps else ""
            out.print(
                " · ".join(filter(None, (f"{clock(event)} step {state.step}{of}", state.figures()))), soft_wrap=True
            )
            said_at = event.created_at


_WAITING = "waiting for the job"
STYLES = {"warn": "yellow", "error": "red"}


def stamped(event: Event) -> str:
    mark = {"warn": "warning: ", "error": "error: "}.get(event.level, "")
    return f"{clock(event)} {mark}{line(event)}"


def clock(event: Event) -> str:
    return time.strftime("%H:%M:%S", time.localtime(event.created_at))


# --- the end --------------------------------------------------------------------------------------------------------


def show_end(run: Run, events: Iterable[Event] = ()) -> None:
    """What a run came to, and what to type next.

    Args:
        events: of a sweep, whose trials are shown even if it left no result.

    Raises:
        AdaptoryError: the run failed; the error is the one that stopped it.
    """
    out = console()
    if run.sweeps:
        from orchestrator.commands.showing_sweeps import show_outcome
        from orchestrator.runs.sweeps import SweepProgress

        show_outcome(run, SweepProgress.of(run, events))
    if run.state == "failed":
        error = failure(run)
        for text in str(error.context.get("log") or "").splitlines()[-_LOG_LINES:]:
            say(f"  {text}")
        again = "" if error.code == "training_diverged" else f"; `adaptory runs resume {run.name}` continues it"
        say(f"Run {run.name} failed. See `adaptory runs logs {run.name}`{again}.")
        raise error
    if run.result and run.result.evaluation:
        out.print(before_after(run.result.evaluation))
        if run.result.evaluation.samples:
            out.print(answers(run.result.evaluation))
    if run.state == "succeeded":
        kind = "weights" if run.spec.get("tuning", {}).get("type") == "full" else "adapter"
        out.print(f"Run {run.name} succeeded{_took(run)}.")
        rows: list[tuple[str, Any]] = [(kind, run.adapter)]
        if run.adapter:
            short = run.adapter.removeprefix("sha256:")[:12]
            rows += [
                ("look", f"adaptory adapters show {short}"),
                ("check", f"adaptory adapters verify {short}"),
                ("export", f"adaptory adapters export {short} --out ./{run.name}"),
            ]
        if serve := run.spec.get("serve"):
            rows.append(("ask", f"adaptory chat {run.tenant}/{serve['route']}"))
        curves = f"adaptory sweep plot {run.name} --out {run.name}" if run.sweeps else f"adaptory runs plot {run.name}"
        out.print(fields([*rows, ("curves", curves)]))
    else:
        out.print(f"Run {run.name} {run.state.words}. `adaptory runs resume {run.name}` continues it.")


def failure(run: Run) -> AdaptoryError:
    """The error that ended a run, with exit code 1: the command was right, the run was not."""
    error = AdaptoryError.from_dict(run.error) if run.error else RunError(f"Run {run.name} failed.", run=run.id)
    error.exit_code = 1
    return error


def _took(run: Run) -> str:
    if run.started_at is None or run.finished_at is None:
        return ""
    return f" after {duration(run.finished_at - run.started_at)}"


def before_after(evaluation: EvaluationResult) -> Any:
    """What the base model scores, with examples before each question too where the spec asked for it, and what the trained one does."""
    few_shot = evaluation.few_shot
    shown = [] if few_shot is None else [f"{evaluation.examples:g}-shot"]
    columns = ["metric", "before", *shown, "after", "change"]
    result = table(*columns, title=f"On {evaluation.rows} held-out rows", right=columns[1:])
    for name, after in evaluation.after.items():
        before = evaluation.before.get(name)
        change = "" if before is None else f"{after - before:+.3f}"
        cells = [before] if few_shot is None else [before, few_shot.get(name)]
        result.add_row(name, *("" if value is None else f"{value:.3f}" for value in [*cells, after]), change)
    return result


def answers(evaluation: EvaluationResult, most: int = 3) -> Any:
    """A few held-out rows side by side."""
    shown = [] if evaluation.few_shot is None else [f"{evaluation.examples:g}-shot"]
    result = table("asked", "expected", "before", *shown, "after", title="Answers")
    for sample in evaluation.samples[:most]:
        between = [sample.few_shot or ""] if shown else []
        texts = sample.prompt, sample.expected, sample.before, *between, sample.after
        result.add_row(*(_cut(text) for text in texts))
        result.add_section()
    return result


def _cut(text: str, most: int = 240) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
