"""`adaptory sweep …`: the trials of a sweep, which of them won, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.backend import Backend, complete_sweep, complete_trial
from orchestrator.commands.output import Json, console, print_json, say

if TYPE_CHECKING:
    from orchestrator.runs.run import Run
    from orchestrator.runs.sweeps import SweepProgress

app = typer.Typer(no_args_is_help=True, epilog="Example: adaptory sweep show finance-entities-sweep")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the sweep.", autocompletion=complete_sweep)]


@app.command(epilog="Example: adaptory sweep show finance-entities-sweep")
def show(name: Name, as_json: Json = False) -> None:
    """Show a sweep: its trials, the best so far, the time left; at its end the winner and why it won."""
    from orchestrator.commands import showing_sweeps

    run, progress = _sweep(Backend(), name)
    print_json(showing_sweeps.details(run, progress)) if as_json else showing_sweeps.show_sweep(run, progress)


@app.command("stop-trial", epilog="Example: adaptory sweep stop-trial finance-entities-sweep t03")
def stop_trial(
    name: Name,
    trial: Annotated[
        str, typer.Argument(metavar="TRIAL", help="Name of the trial, such as t03.", autocompletion=complete_trial)
    ],
    as_json: Json = False,
) -> None:
    """End one trial of a sweep; the others go on, and what it has reached until then counts."""
    from orchestrator.runs import submission

    backend = Backend()
    run = backend.run(name)
    new = submission.stop_trial(
        run, trial, settings=backend.settings, store=backend.store, db=backend.db, jobs=backend.jobs_if_running
    )
    if as_json:
        print_json({"run": run.id, "trial": trial, "asked": True, "asked_before": not new})
    else:
        said = "Asked" if new else "Was asked before:"
        console().print(f"{said} {run.name} to end trial {trial}; it does so within a few seconds.")


@app.command(epilog="Example: adaptory sweep plot finance-entities-sweep --out pictures")
def plot(
    name: Name,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory to write PNGs to; default: the sweep's name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a sweep: loss curves, the metric against the learning rate, parallel coordinates, what mattered."""
    from orchestrator.commands import plot_sweep, showing_sweeps
    from orchestrator.errors import RunError

    run, progress = _sweep(Backend(), name)
    written = plot_sweep.save(progress, run.name, out or Path(run.name)) if progress.named else []
    if not written:
        hint = f"`adaptory runs events {run.name}` says how far it came."
        raise RunError(f"Sweep {run.name} {run.state.words} and no trial has begun yet.", hint=hint, run=run.id)
    if as_json:
        files = [str(path.absolute()) for path in written]
        print_json({"run": run.id, "files": files, "importance": showing_sweeps.details(run, progress)["importance"]})
        return
    for path in written:
        console().print(f"Wrote {path}.", soft_wrap=True)
    if not any(path.stem == "learning-rate" for path in written):
        say("No learning rate was searched, so there is no picture over it.")


def _sweep(backend: Backend, name: str) -> tuple[Run, SweepProgress]:
    """
    Raises:
        RunNotFound, RunError: there is no such run, or it has no trials.
    """
    from orchestrator.errors import UsageError
    from orchestrator.runs.repository import list_events
    from orchestrator.runs.sweeps import SweepProgress

    run = backend.run(name)
    if not run.sweeps:
        raise UsageError(
            f"Run {run.name} is one fine-tune, no sweep.", hint=f"`adaptory runs show {run.name}` shows it."
        )
    return run, SweepProgress.of(run, list_events(backend.db, run.id))
