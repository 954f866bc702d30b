"""`adaptory run` and `adaptory runs …`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.backend import Backend, complete_run
from orchestrator.commands.output import Json, console, print_json, print_json_line, say

if TYPE_CHECKING:
    from orchestrator.runs.run import Run

app = typer.Typer(no_args_is_help=True, epilog="Example: adaptory runs list --state running")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the run.", autocompletion=complete_run)]
Follow = Annotated[bool, typer.Option("--follow/--detach", "-f", help="Watch it; Ctrl-C leaves it running.")]


def register(root: typer.Typer) -> None:
    root.command(
        "run", epilog="Example: adaptory run jobs/examples/finance-entities.yaml --set train.epochs=1 --follow"
    )(run)


def run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec, in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set any field of the spec; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, instead of the spec's.")] = None,
    follow: Follow = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, plan and write everything; start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit a fine-tuning run, or a sweep of many. It goes on without this terminal; --follow watches it."""
    from orchestrator.commands import submitting

    backend = Backend()
    job = submitting.load(spec, overrides or [], name, backend.settings)
    if dry_run:
        plan = submitting.plan(job, backend)
        print_json(plan) if as_json else submitting.show(plan)
        return
    started = submitting.submit(job, backend)
    _after_start(backend, started, follow=follow, as_json=as_json)


def _after_start(backend: Backend, run: Run, *, follow: bool, as_json: bool) -> None:
    if follow:
        _follow(backend, run, as_json=as_json)
    elif as_json:
        print_json(_summary(run))
    else:
        out = console()
        out.print(f"Run {run.name} ({run.id}) {run.state.words}. It goes on without this terminal.")
        ways = {
            f"adaptory runs events {run.name} --follow": "watch it",
            f"adaptory {'sweep' if run.sweeps else 'runs'} show {run.name}": "where it is",
            f"adaptory runs cancel {run.name}": "stop it",
        }
        for command, words in ways.items():
            out.print(f"  {command.ljust(max(map(len, ways)))}    {words}", soft_wrap=True)


def _follow(backend: Backend, run: Run, *, as_json: bool) -> None:
    """Render events until the run is settled, then its end. Ctrl-C only stops watching."""
    from orchestrator.commands import following
    from orchestrator.runs.follow import follow
    from orchestrator.runs.repository import get_run, list_events

    events = follow(
        run.id,
        db=backend.db,
        store=backend.store,
        jobs=backend.jobs_if_running,
        ray_address=backend.settings.ray_address,
        keys=backend.keys,
    )
    try:
        if as_json:
            for event in events:
                if event is not None:
                    print_json_line(event)
        elif run.sweeps:
            from orchestrator.commands import following_sweeps

            following_sweeps.show_events(run, events)
        else:
            following.show_events(events)
    except KeyboardInterrupt:
        say(
            f"\nNo longer watching. Run {run.name} goes on: `adaptory runs events {run.name} --follow` watches it again,"
        )
        say(f"`adaptory runs cancel {run.name}` stops it.")
        raise typer.Exit(130) from None
    ended = get_run(backend.db, run.id)
    if not as_json:
        following.show_end(ended, list_events(backend.db, ended.id) if ended.sweeps else ())
        return
    print_json_line(_summary(ended))
    if ended.state == "failed":
        raise typer.Exit(1)


# --- reading --------------------------------------------------------------------------------------------------------


@app.command("list", epilog="Example: adaptory runs list --state running")
def list_(
    state: Annotated[list[str] | None, typer.Option(help="Only runs in this state; repeatable.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="At most this many, newest first.")] = 50,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    from orchestrator.commands import showing
    from orchestrator.runs.repository import list_runs

    backend = Backend()
    states = [showing.state(word) for word in state] if state else None
    backend.reconcile()
    found = list_runs(backend.db, tenant=tenant, states=states, limit=limit)
    print_json([_summary(run) for run in found]) if as_json else showing.show_list(found)


@app.command(epilog="Example: adaptory runs show finance-entities")
def show(name: Name, as_json: Json = False) -> None:
    """Show a run: state, attempts, progress, metrics, adapter, and where the time went."""
    from orchestrator.commands import showing
    from orchestrator.runs.repository import list_attempts, list_events

    backend = Backend()
    run = backend.run(name)
    attempts, events = list_attempts(backend.db, run.id), list_events(backend.db, run.id)
    print_json(showing.details(run, attempts, events)) if as_json else showing.show_run(run, attempts, events)


@app.command(epilog="Example: adaptory runs logs finance-entities --follow")
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Only this attempt's.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a run's processes logged; `--json` prints a JSON object a line."""
    from orchestrator.commands import showing

    backend = Backend()
    run = backend.run(name)
    for entry in showing.log_lines(backend, run, attempt, follow=follow):
        print_json_line(entry) if as_json else typer.echo(showing.log_text(entry))


@app.command(epilog="Example: adaptory runs events finance-entities --follow")
def events(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    limit: Annotated[int | None, typer.Option("-n", "--limit", min=1, help="Only the last ones.")] = None,
    as_json: Json = False,
) -> None:
    """Print what happened in a run; `--json` prints a JSON object a line."""
    from orchestrator.commands import showing
    from orchestrator.runs.repository import list_events

    backend = Backend()
    run = backend.run(name)
    if follow and not run.settled:
        _follow(backend, run, as_json=as_json)
        return
    for event in list_events(backend.db, run.id)[-limit if limit else None :]:
        print_json_line(event) if as_json else typer.echo(showing.event_text(event))


@app.command(epilog="Example: adaptory runs plot finance-entities --out curves.png")
def plot(
    name: Name,
    out: Annotated[
        Path | None, typer.Option(help="File to write: .png, .svg or .pdf; default NAME.png in this directory.")
    ] = None,
    terminal: Annotated[bool, typer.Option("--terminal/--no-terminal", help="Also draw in the terminal.")] = True,
    as_json: Json = False,
) -> None:
    """Plot training and validation loss and learning rate: a picture, and a drawing in the terminal."""
    from orchestrator.commands import plot as curves_of
    from orchestrator.errors import RunError
    from orchestrator.runs.repository import list_events

    if out is not None:
        curves_of.require_format(out)
    backend = Backend()
    run = backend.run(name)
    curves = curves_of.Curves.of(list_events(backend.db, run.id))
    if not curves:
        hint = f"`adaptory runs events {run.name}` says how far it came."
        if run.sweeps:
            hint = f"It is a sweep: `adaptory sweep plot {run.name} --out {run.name}` draws its trials."
        raise RunError(f"Run {run.name} {run.state.words} and has reported no loss yet.", hint=hint, run=run.id)
    target = out or Path(f"{run.name}.png")
    curves_of.save(curves, run.name, target)
    if as_json:
        print_json({"run": run.id, "file": str(target.absolute()), **curves.points()})
        return
    screen = console()
    if terminal:
        typer.echo(curves_of.draw(curves, width=min(screen.width, 110), colour=screen.color_system is not None))
    screen.print(f"Wrote {target}.")


# --- steering -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: adaptory runs cancel finance-entities")
def cancel(name: Name, as_json: Json = False) -> None:
    """Stop a run for good and free what it held. Checkpoints that it has stay, and `runs resume` goes on from them."""
    from orchestrator.runs.submission import cancel as stop

    backend = Backend()
    run = stop(backend.run(name), **_parts(backend), jobs=backend.jobs_if_running, say=say)
    _said(run, as_json, f"Run {run.name} {run.state.words}.")


@app.command(epilog="Example: adaptory runs pause finance-entities")
def pause(name: Name, as_json: Json = False) -> None:
    """Have a run save a checkpoint and give its machines back, until it is resumed."""
    from orchestrator.runs.submission import pause as halt

    backend = Backend()
    run = halt(backend.run(name), **_parts(backend), jobs=backend.jobs_if_running, say=say)
    again = f" `adaptory runs resume {run.name}` continues it." if run.state == "paused" else ""
    _said(run, as_json, f"Run {run.name} {run.state.words}.{again}")


@app.command(epilog="Example: adaptory runs resume finance-entities --follow")
def resume(name: Name, follow: Follow = False, as_json: Json = False) -> None:
    """Continue a paused, failed or cancelled run from its last checkpoint; without one it begins again."""
    from orchestrator.runs.submission import resume as again

    backend = Backend()
    run = again(backend.run(name), **_parts(backend), jobs=backend.jobs)
    _after_start(backend, run, follow=follow, as_json=as_json)


def _parts(backend: Backend) -> dict[str, Any]:
    return {"settings": backend.settings, "db": backend.db, "store": backend.store}


def _said(run: Run, as_json: bool, words: str) -> None:
    print_json(_summary(run)) if as_json else console().print(words)


def _summary(run: Run) -> dict[str, Any]:
    from orchestrator.commands.showing import summary

    return summary(run)
