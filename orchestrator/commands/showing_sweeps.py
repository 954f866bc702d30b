"""A sweep's trials as tables, sentences and JSON."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.commands.following import before_after
from orchestrator.commands.output import console, duration, fields, listing, number
from orchestrator.runs import winner
from orchestrator.runs.states import TrialState
from orchestrator.runs.winner import figure, setting
from orchestrator.spec.sweep import short_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.runs.run import Run
    from orchestrator.runs.sweeps import SweepProgress, Trial

_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "diverged": "red",
    "failed": "red",
    "pending": "dim",
}
_OVER = {TrialState.RUNNING: "unfinished", TrialState.PENDING: "not tried"}
"""What a state is called once the run itself is over or paused."""


# --- words ----------------------------------------------------------------------------------------------------------


def configuration(config: dict[str, Any]) -> str:
    """`learning_rate 0.001, epochs 3`"""
    return ", ".join(f"{short_name(name)} {setting(value)}" for name, value in config.items())


def counted(progress: SweepProgress) -> str:
    """`12 trials: 3 finished, 4 running, 5 pending`"""
    counts = progress.counts()
    total = sum(counts.values())
    parts = ", ".join(f"{count} {word(state, settled=progress.settled)}" for state, count in counts.items())
    return f"{total} trial{'s' if total != 1 else ''}{': ' if parts else ''}{parts}"


def word(state: TrialState, *, settled: bool) -> str:
    return _OVER.get(state, state.value) if settled else state.value


def best(progress: SweepProgress) -> str:
    """`t05, validation_loss 0.4123 (learning_rate 0.001, epochs 3)`, or nothing."""
    trial = progress.best
    if trial is None or (value := trial.value(progress.metric)) is None:
        return ""
    return f"{trial.name}, {progress.metric} {figure(value)} ({configuration(trial.config)})"


def placed(progress: SweepProgress) -> str:
    """How the trials were placed, and why."""
    return ": ".join(str(progress.plan[name]) for name in ("placement", "why") if progress.plan.get(name))


def computed(compute: dict[str, Any]) -> str:
    """`310 steps and 52,000 tokens; one by one 900 steps and 150,000 tokens, 2.9 times as much`"""
    tokens, alone = compute.get("tokens"), compute.get("separate_tokens")
    if not tokens:
        return ""
    words = f"{number(compute.get('steps', 0))} steps and {number(tokens)} tokens"
    if not alone:
        return words
    apart = f"{number(compute.get('separate_steps', 0))} steps and {number(alone)} tokens"
    return f"{words}; one by one {apart}, {alone / tokens:.1f} times as much"


# --- tables ---------------------------------------------------------------------------------------------------------


def trial_table(progress: SweepProgress, trials: Sequence[Trial], width: int) -> Any:
    """Configuration, epoch, losses and state of each; the best has a star."""
    from rich.text import Text

    names = list(dict.fromkeys(name for trial in trials for name in trial.config))
    measured = [] if progress.metric == "validation_loss" else [progress.metric]
    columns = ["trial", *map(short_name, names), "epoch", "loss", "validation", *measured, "state"]
    winning, rows = progress.best, []
    for trial in trials:
        said = word(trial.state, settled=progress.settled)
        style = _COLOURS.get(trial.state.value, "")
        cells: list[Any] = [
            f"{trial.name} *" if trial is winning else trial.name,
            *(setting(trial.config[name]) if name in trial.config else "" for name in names),
        ]
        cells += [_epochs(trial), _figure(trial.loss), _figure(trial.validation_loss)]
        cells += [_figure(trial.metrics.get(name)) for name in measured]
        cells.append(Text(said, style=f"bold {style}" if trial is winning else style))
        rows.append(cells)
    right = [column for column in columns if column not in ("trial", "targets", "schedule", "state")]
    return listing(columns, rows, width=width, right=right, drop=("loss", "epoch"))


def ranking(progress: SweepProgress, width: int) -> Any:
    """The best first, each with its distance to the best; those without a value last."""
    ranked = progress.ranked()
    if progress.best in ranked:
        ranked.insert(0, ranked.pop(ranked.index(progress.best)))
    rest = [trial for trial in progress.trials if all(trial is not other for other in ranked)]
    names = list(dict.fromkeys(name for trial in [*ranked, *rest] for name in trial.config))
    others = [
        name for name in ("validation_loss", *sorted({n for t in ranked for n in t.metrics})) if name != progress.metric
    ]
    columns = ["trial", *map(short_name, names), progress.metric, "behind", *others, "steps", "state"]
    first = ranked[0].value(progress.metric) if ranked else None
    rows = []
    for trial in [*ranked, *rest]:
        value = trial.value(progress.metric)
        behind = "" if value is None or first is None or trial is ranked[0] else figure(abs(value - first))
        cells = [trial.name, *(setting(trial.config[name]) if name in trial.config else "" for name in names)]
        cells += [_figure(value), behind, *(_figure(trial.value(name)) for name in others), number(trial.step)]
        rows.append([*cells, word(trial.state, settled=progress.settled)])
    right = [column for column in columns if column not in ("trial", "targets", "schedule", "state")]
    result = listing(columns, rows, width=width, right=right, drop=("steps", *reversed(others), "behind"))
    measured = "" if progress.metric == "validation_loss" else f"; {progress.metric} on validation rows"
    result.title = f"Trials, the best first{measured}"
    return result


def show_outcome(run: Run, progress: SweepProgress) -> None:
    """The winner's table and why it won."""
    out = console()
    if not progress.named:
        return
    out.print(ranking(progress, out.width))
    for sentence in winner.reasons(progress, winner.search_space(run)):
        out.print(sentence)
    pairs = [("placed", placed(progress)), ("computed", computed(progress.compute))]
    if any(text for _, text in pairs):
        out.print(fields(pairs))


def show_sweep(run: Run, progress: SweepProgress) -> None:
    """All of a sweep for a person: while it runs, where its trials are; after that, which one won and why."""
    out, now = console(), time.time()
    left = None if progress.settled else progress.seconds_left(now)
    rows = [
        ("state", run.state.value),
        ("trials", counted(progress)),
        ("best", best(progress)),
        ("left", left is not None and f"about {duration(left)}"),
        ("error", (run.error or {}).get("message")),
    ]
    out.print(fields([(name, value) for name, value in rows if value], title=f"Sweep {run.name}"))
    out.print()
    if run.settled:
        show_outcome(run, progress)
        if run.result and run.result.evaluation:
            out.print()
            out.print(before_after(run.result.evaluation))
    elif progress.named:
        out.print(trial_table(progress, progress.trials, out.width))
        out.print(
            f"`adaptory sweep stop-trial {run.name} TRIAL` ends one, `adaptory sweep plot {run.name}` draws them."
        )


def details(run: Run, progress: SweepProgress) -> dict[str, Any]:
    """The same for machines."""
    trials, top = progress.trials, progress.best
    mattered = winner.importance(trials, progress.metric)
    return {
        "run": run.id,
        "name": run.name,
        "state": run.state.value,
        "metric": progress.metric,
        "mode": progress.mode,
        "expected": progress.expected,
        "best": top.name if top else None,
        "value": top.value(progress.metric) if top else None,
        "trials": [_plain(trial) for trial in trials],
        "plan": progress.plan,
        "compute": progress.compute,
        "evaluation": run.result.evaluation.model_dump(mode="json") if run.result and run.result.evaluation else None,
        "why": winner.reasons(progress, winner.search_space(run)) if trials else [],
        "importance": {**asdict(mattered), "method": winner.METHOD} if mattered else None,
        "seconds_left": None if progress.settled else progress.seconds_left(time.time()),
    }


# --- details --------------------------------------------------------------------------------------------------------


def _plain(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in asdict(trial).items() if not name.startswith("_")}


def _epochs(trial: Trial) -> str:
    total = trial.config.get("train.epochs")
    return f"{trial.epoch:.1f}" + (f"/{setting(total)}" if total is not None else "")


def _figure(value: float | None) -> str:
    return "" if value is None else figure(value)
