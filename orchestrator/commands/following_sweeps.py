"""A sweep as it happens: a table of its trials on a terminal; elsewhere a line for each change."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from orchestrator.commands import following, showing_sweeps
from orchestrator.commands.output import console, duration
from orchestrator.commands.showing_sweeps import configuration
from orchestrator.runs.states import TrialState
from orchestrator.runs.sweeps import SweepProgress, Trial
from orchestrator.runs.winner import figure

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from orchestrator.runs.events import Event
    from orchestrator.runs.run import Run

_REFRESHES = 4
"""A second; the table is built then, not at each event."""
_AROUND = 8
"""Lines of the screen that are not trials."""


def show_events(run: Run, events: Iterable[Event | None]) -> None:
    """Render a sweep's events until there are no more. None among them means that nothing is new."""
    out, progress = console(), SweepProgress.of(run)
    (_table if out.is_terminal else _lines)(run.name, progress, events, out)


def _table(name: str, progress: SweepProgress, events: Iterable[Event | None], out: Console) -> None:
    from rich.live import Live

    screen = _Screen(name, progress, out)
    with Live(screen, console=out, transient=True, refresh_per_second=_REFRESHES) as live:
        for event in events:
            if event is None:
                continue
            progress.take(event)
            if event.type == "phase":
                screen.phase = following.line(event)
            if event.type == "message" or event.level != "info":
                live.console.print(_clean(following.stamped(event)), style=following.STYLES.get(event.level, ""))


class _Screen:
    """What the terminal shows, built anew whenever it is drawn, so that it fits a window that was resized."""

    def __init__(self, name: str, progress: SweepProgress, out: Console):
        self._name, self._progress, self._out = name, progress, out
        self.phase = "waiting for the job"

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        progress = self._progress
        left = progress.seconds_left(time.time())
        head = [f"Sweep {self._name}", showing_sweeps.counted(progress) if progress.named else self.phase]
        best = showing_sweeps.best(progress)
        lines = [
            " · ".join(head),
            f"best so far: {best}" if best else "",
            " · ".join(
                filter(
                    None, [f"about {duration(left)} left" if left is not None else "", showing_sweeps.placed(progress)]
                )
            ),
        ]
        # above the table: what a small screen cuts off are its last rows
        parts: list[RenderableType] = [Text(_clean(line), no_wrap=True, overflow="ellipsis") for line in lines if line]
        if progress.named:
            shown = visible(progress, max(3, self._out.height - _AROUND))
            parts.append(showing_sweeps.trial_table(progress, shown, self._out.width))
            if hidden := len(progress.named) - len(shown):
                parts.append(Text(f"… and {hidden} more", style="dim"))
        return Group(*parts)


def visible(progress: SweepProgress, most: int) -> list[Trial]:
    """As many trials as a screen holds, in their order: those that run, the best, then those that ended last."""
    trials, best = progress.trials, progress.best
    if len(trials) <= most:
        return trials

    def rank(trial: Trial) -> tuple[bool, bool, bool, float]:
        return (
            trial is not best,
            trial.state is not TrialState.RUNNING,
            trial.state is TrialState.PENDING,
            -(trial.ended_at or 0.0),
        )

    kept = {trial.name for trial in sorted(trials, key=rank)[:most]}
    return [trial for trial in trials if trial.name in kept]


def _lines(name: str, progress: SweepProgress, events: Iterable[Event | None], out: Console) -> None:
    """Each change of a trial's state, each validation, each new best; nothing twice."""
    seen: dict[str, tuple[Any, ...]] = {}
    best: tuple[str, float | None] | None = None
    plan = ""
    for event in events:
        if event is None:
            continue
        trial = progress.take(event)
        if event.type in ("message", "phase", "state") or (event.level != "info" and trial is None):
            out.print(_clean(following.stamped(event)), style=following.STYLES.get(event.level, ""), soft_wrap=True)
        words = []
        if trial is not None:
            value = trial.metrics.get(progress.metric)
            now = (trial.state, trial.validation_loss, value, trial.message if trial.state.over else "")
            if now != seen.get(trial.name):
                words.append(_change(trial, progress.metric, first=trial.name not in seen))
                seen[trial.name] = now
        if (placed := showing_sweeps.placed(progress)) != plan:
            plan = placed
            words.append(placed)
        winning = progress.best
        if winning is not None and (winning.name, winning.value(progress.metric)) != best:
            best = (winning.name, winning.value(progress.metric))
            words.append(f"best so far: {showing_sweeps.best(progress)}")
        for text in words:
            out.print(_clean(f"{following.clock(event)} {text}"), soft_wrap=True)


def _change(trial: Trial, metric: str, *, first: bool) -> str:
    """`t05 running: learning_rate 0.001, epochs 3 · epoch 1.0 · loss 0.4120 · validation 0.3880`"""
    parts = [
        configuration(trial.config) if first else "",
        f"epoch {trial.epoch:.1f}" if trial.step else "",
        f"loss {figure(trial.loss)}" if trial.loss is not None else "",
        f"validation {figure(trial.validation_loss)}" if trial.validation_loss is not None else "",
        f"{metric} {figure(trial.metrics[metric])}" if metric in trial.metrics else "",
        trial.message if trial.state.over else "",
    ]
    said = " · ".join(part for part in parts if part)
    return f"{trial.name} {trial.state.value}" + (f": {said}" if said else "")


def _clean(text: str) -> str:
    """Without control characters: what a job says must not steer the terminal or break a line."""
    return "".join(char if char.isprintable() else " " for char in text)
