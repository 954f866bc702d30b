"""`adaptory up | down | status | doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.output import Json, console, fields, print_json, say, table

if TYPE_CHECKING:
    from cluster.jobs import RayJobClient
    from orchestrator.settings import Settings


def register(app: typer.Typer) -> None:
    app.command("up", epilog="Example: adaptory up")(up)
    app.command("down", epilog="Example: adaptory down --force")(down)
    app.command("status", epilog="Example: adaptory status --json")(status)
    app.command("doctor", epilog="Example: adaptory doctor")(doctor)


def up(as_json: Json = False) -> None:
    """Start the local Ray, or check that the cluster of ADAPTORY_RAY_ADDRESS answers; print where it is."""
    import cluster
    from orchestrator.settings import load_settings

    settings = load_settings()
    client = cluster.connect(settings, say=say)
    _print(_facts(client, settings), as_json)


def down(
    force: Annotated[bool, typer.Option("--force", help="Even while runs are on it; they can be resumed.")] = False,
    as_json: Json = False,
) -> None:
    """Stop the local Ray and everything it started."""
    import cluster
    from cluster import local
    from orchestrator.errors import ClusterError
    from orchestrator.settings import load_settings

    settings = load_settings()
    if settings.remote:
        raise ClusterError(
            f"The cluster at {settings.ray_address} was started by somebody else, so it is not stopped from here.",
            hint="Stop it where it was started; unset ADAPTORY_RAY_ADDRESS to stop the local Ray.",
        )
    if not force and (client := cluster.connect_if_running(settings)) is not None and (jobs := client.active()):
        raise ClusterError(
            f"Still on the local Ray: {', '.join(jobs)}.",
            hint="`adaptory runs pause` saves a run first; or `adaptory down --force`, then `adaptory runs resume`.",
            jobs=jobs,
        )
    stopped = local.stop(settings)
    if as_json:
        print_json({"stopped": stopped})
    else:
        console().print("The local Ray is stopped." if stopped else "No local Ray was running.")


def status(as_json: Json = False) -> None:
    """Show whether the cluster runs, what it has and which jobs are on it."""
    import cluster
    from orchestrator.settings import load_settings

    settings = load_settings()
    client = cluster.connect_if_running(settings)
    if client is not None:
        _print(_facts(client, settings), as_json)
    elif as_json:
        print_json({"running": False})
    else:
        console().print("No local Ray runs. `adaptory up` starts it, and so does `adaptory run`.")


def doctor(as_json: Json = False) -> None:
    """Check everything a run needs, and say what to do about what is missing. Exit code 1 if nothing could run."""
    from cluster.doctor import Level, examine
    from orchestrator.settings import load_settings

    checks = list(examine(load_settings()))
    if as_json:
        print_json({"ok": all(c.level is not Level.FAIL for c in checks), "checks": [c.model_dump() for c in checks]})
    else:
        from rich.text import Text

        colours = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
        rows = table("check", "", "found", "what to do")
        for check in checks:
            rows.add_row(check.name, Text(check.level.value, style=colours[check.level]), check.found, check.advice)
        console().print(rows)
    if any(check.level is Level.FAIL for check in checks):
        raise typer.Exit(1)


def _facts(client: RayJobClient, settings: Settings) -> dict[str, Any]:
    from cluster.probe import resources_of

    resources = resources_of(client)
    return {
        "running": True,
        **client.describe(),
        "resources": resources.model_dump(),
        "cpus": resources.cpus,
        "gpus": resources.gpus,
        "jobs": client.active(),
        "token_file": str(settings.keys / "ray_token") if client.local else None,
    }


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    memory = sum(node["memory"] for node in facts["resources"]["nodes"]) / (1 << 30)
    nodes = len(facts["resources"]["nodes"])
    console().print(
        fields(
            [
                (
                    "cluster",
                    f"{'local ' if facts['local'] else ''}Ray {facts['ray']}, {nodes} node{'s' * (nodes != 1)}",
                ),
                ("address", facts["address"]),
                (
                    "dashboard",
                    f"{facts['dashboard']} (it asks for the token)" if facts["token_file"] else facts["dashboard"],
                ),
                ("token", facts["token_file"]),
                ("resources", f"{facts['cpus']:g} CPUs, {facts['gpus']:g} GPUs, {memory:.1f} GiB of memory"),
                ("jobs", ", ".join(facts["jobs"]) or "none"),
            ]
        )
    )
