"""`adaptory up | down | status | doctor`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands import serving
from orchestrator.commands.backend import Backend
from orchestrator.commands.output import Json, console, fields, print_json, say, table

if TYPE_CHECKING:
    from cluster.jobs import RayJobClient
    from cluster.serving import Application
    from orchestrator.settings import Settings


def register(app: typer.Typer) -> None:
    app.command("up", epilog="Example: adaptory up")(up)
    app.command("down", epilog="Example: adaptory down --force")(down)
    app.command("status", epilog="Example: adaptory status --json")(status)
    app.command("doctor", epilog="Example: adaptory doctor")(doctor)


def up(
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Also serve models; off for who only trains.")
    ] = True,
    base: Annotated[
        list[str] | None,
        typer.Option(help="Base model to serve; repeatable. Default: those that adapters were trained on."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the endpoint. Default: the first free one.")
    ] = None,
    dtype: Annotated[
        serving.Dtype,
        typer.Option(help="Of the weights; auto: bfloat16 where the engine's hardware multiplies it, else float32."),
    ] = serving.Dtype.AUTO,
    engine: Annotated[
        serving.EngineName,
        typer.Option(help="What answers: Adaptory's own engine, or vLLM in the environment of ADAPTORY_VLLM_PYTHON."),
    ] = serving.EngineName.ADAPTORY,
    replicas: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Engines for each base; 1:4 grows with what waits, 0:2 has none while nobody asks (the first to ask then "
            "waits for the start).",
        ),
    ] = "1",
    idle: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="After which the last engine goes, with --replicas 0:N.")
    ] = 300.0,
    gateways: Annotated[
        int, typer.Option(min=1, help="Processes that answer HTTP requests; several need PostgreSQL.")
    ] = 1,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests that an engine answers at the same time.")] = 32,
    max_length: Annotated[
        int, typer.Option(min=16, help="Tokens of prompt and answer together, and no more than the base takes.")
    ] = 4096,
    max_adapters: Annotated[
        int, typer.Option(min=1, help="In an engine at the same time; others come when they are asked for.")
    ] = 64,
    as_json: Json = False,
) -> None:
    """Start the local Ray, or check that the cluster of ADAPTORY_RAY_ADDRESS answers, and serve; print where, and the first key."""
    import cluster

    backend = Backend()
    backend.settings.check_gateways(gateways)  # before anything is started
    client = cluster.connect(backend.settings, say=say)
    if not serve:
        _print(_facts(client, backend.settings), as_json)
        return
    if not backend.settings.remote:
        serving.metrics_key(backend.settings)
    application = serving.start(
        client,
        backend.settings,
        backend.db,
        backend.store,
        bases=base or (),
        port=port,
        dtype=dtype.value,
        engine=engine,
        keys=backend.keys,
        replicas=replicas,
        idle_seconds=idle,
        gateways=gateways,
        sizes={"max_sequences": max_sequences, "max_length": max_length, "max_adapters": max_adapters},
    )
    key = serving.first_key(backend.db, backend.settings.tenant, actor=backend.actor)
    _print(_facts(client, backend.settings, application), as_json, key.secret if key else None)


def down(
    force: Annotated[
        bool, typer.Option("--force", help="Even while runs are on it (they can be resumed) or requests are answered.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="For answers that have begun; new ones are refused.")
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """End serving when it has answered what it is answering, stop the local Ray and everything it started."""
    import cluster
    from cluster import local
    from cluster import serving as cluster_serving
    from orchestrator.errors import ClusterError
    from orchestrator.settings import load_settings

    settings = load_settings()
    client = cluster.connect_if_running(settings)
    if settings.remote:
        assert client is not None
        stopped = cluster_serving.find(client.dashboard, serving.APPLICATION) is not None
        if not stopped:
            raise ClusterError(
                f"The cluster at {settings.ray_address} was started by somebody else, so it is not stopped from here.",
                hint="Stop it where it was started; unset ADAPTORY_RAY_ADDRESS to stop the local Ray.",
            )
        _stop_serving(client, settings, None if force else wait)
    else:
        if not force and client is not None and (jobs := client.active()):
            raise ClusterError(
                f"Still on the local Ray: {', '.join(jobs)}.",
                hint="`adaptory runs pause` saves a run first; or `adaptory down --force`, then `adaptory runs resume`.",
                jobs=jobs,
            )
        if not force and client is not None and cluster_serving.find(client.dashboard, serving.APPLICATION) is not None:
            _stop_serving(client, settings, wait)
        stopped = local.stop(settings)
    if as_json:
        print_json({"stopped": stopped})
    elif settings.remote:
        console().print(f"Serving is stopped; the cluster at {settings.ray_address} goes on.")
    else:
        console().print("The local Ray is stopped." if stopped else "No local Ray was running.")


def _stop_serving(client: RayJobClient, settings: Settings, wait: float | None) -> None:
    """
    Args:
        wait: seconds for answers that have begun; None: cut them.
    """
    from cluster import serving as cluster_serving
    from orchestrator.errors import ClusterError
    from orchestrator.store import Store

    if wait is not None:
        try:
            serving.drain(client, settings, Store(settings.store), wait)
        except ClusterError as error:  # a server that does not even answer this has nothing to be waited for
            say(str(error))
    cluster_serving.stop(client.dashboard)


def status(as_json: Json = False) -> None:
    """Show whether the cluster runs, what it has, which jobs are on it and what is served."""
    import cluster
    from cluster import serving as cluster_serving
    from orchestrator.settings import load_settings

    settings = load_settings()
    client = cluster.connect_if_running(settings)
    if client is not None:
        found = cluster_serving.find(client.dashboard, serving.APPLICATION)
        if found is not None and (key := settings.metrics_key):
            found = cluster_serving.with_loads(found, key)
        _print(_facts(client, settings, found), as_json)
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


def _facts(client: RayJobClient, settings: Settings, application: Application | None = None) -> dict[str, Any]:
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
        "serving": None if application is None else application.model_dump(),
    }


def _print(facts: dict[str, Any], as_json: bool, key: str | None = None) -> None:
    """
    Args:
        key: a new one; it is told here and nowhere else.
    """
    if as_json:
        print_json(facts if key is None else facts | {"api_key": key})
        return
    from cluster.resources import count

    memory = sum(node["memory"] for node in facts["resources"]["nodes"]) / (1 << 30)
    nodes = count(len(facts["resources"]["nodes"]), "node")
    dashboard = f"{facts['dashboard']} (it asks for the token)" if facts["token_file"] else facts["dashboard"]
    pairs = [
        ("cluster", f"{'local ' if facts['local'] else ''}Ray {facts['ray']}, {nodes}"),
        ("address", facts["address"]),
        ("dashboard", dashboard),
        ("token", facts["token_file"]),
        ("resources", f"{count(facts['cpus'], 'CPU')}, {count(facts['gpus'], 'GPU')}, {memory:.1f} GiB of memory"),
        ("jobs", ", ".join(facts["jobs"]) or "none"),
        *_served(facts["serving"]),
        ("api key", key and f"{key} (shown this once)"),
    ]
    console().print(fields(pairs))


def _served(application: dict[str, Any] | None) -> list[tuple[str, str]]:
    if application is None:
        return [("serving", "nothing; `adaptory up` starts it")]
    running = application["status"] == "RUNNING"
    state = application["url"] if running else f"{application['status'].lower()}: {application['message']}"
    lines = [("serving", state)]
    for deployment in application["deployments"]:
        states = Counter(replica["state"].lower() for replica in deployment["replicas"])
        counted = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "none while nobody asks"
        model = f" ({deployment['model']})" if deployment["model"] else ""
        lines.append(("", f"{deployment['name']}{model}: {counted}"))
        lines += [("", f"  {r['id']}: {_load(r['load'])}") for r in deployment["replicas"] if r["load"]]
    return lines


def _load(load: dict[str, Any]) -> str:
    waiting = f"{load['waiting']} waiting ({load['waiting_tokens']:,} tokens)"
    cache = (
        f"cache {load['cache_tokens_used']:,} of {load['cache_tokens']:,} tokens ({load['cache_bytes'] >> 20:,} MiB)"
    )
    adapters = f"{len(load['adapters'])} adapters ({load['adapter_bytes'] >> 20:,} MiB)"
    return f"{load['running']} answering, {waiting}, {cache}, {adapters}"
