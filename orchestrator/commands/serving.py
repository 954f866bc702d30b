"""Starting and showing the serving application: a Ray job deploys it (`python -m serving`), and Ray Serve keeps it."""

from __future__ import annotations

import json
import secrets
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from orchestrator.commands.output import say
from orchestrator.errors import ClusterError, UsageError

if TYPE_CHECKING:
    from cluster.jobs import RayJobClient
    from cluster.serving import Application
    from orchestrator.db import Database
    from orchestrator.registry.signing import Keys
    from orchestrator.settings import Settings
    from orchestrator.store import Store
    from orchestrator.tenants.keys import IssuedKey

APPLICATION = "adaptory"
"""Serve's name of it, as `serving.app` has it."""

DEFAULT_BASE = "smollm2-135m-instruct"
"""Served where nothing has been trained yet: small, and it needs no model hub."""

FIRST_PORT = 8000


class EngineName(StrEnum):
    ADAPTORY = "adaptory"
    VLLM = "vllm"


class Dtype(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


_POLL_SECONDS = 0.5
_JOB = "serving-"


def start(
    client: RayJobClient,
    settings: Settings,
    db: Database,
    store: Store,
    *,
    bases: Sequence[str],
    port: int | None,
    dtype: str,
    engine: EngineName,
    keys: Keys,
    replicas: str = "1",
    idle_seconds: float = 300.0,
    gateways: int = 1,
    sizes: Mapping[str, int] | None = None,
) -> Application:
    """Deploy the application, or change what runs to what is asked for; returns when it answers.

    Args:
        bases: references of base models; none: those that adapters were trained on.
        port: None: that which it has, else the first that is free.
        dtype: of weights and caches: `bfloat16`, `float32` or `auto`.
        keys: adapters that these have signed are served, others refused. Only public keys leave this machine.
        replicas: of each engine, `2` or `1:4`.
        idle_seconds: after which the last replica goes, where there may be none.
        gateways: processes that answer HTTP requests.
        sizes: of each engine, as `serving.plan.Plan` calls them; what is left out is as there.

    Raises:
        UsageError: `replicas` is neither.
        ClusterError: it cannot be deployed; the message says why.
        SettingsError: vLLM is asked for, and its environment is not there; or several gateways over SQLite.
        KeyUnusable: the signing key or a trusted one cannot be read.
    """
    from cluster import serving

    scale = parse_replicas(replicas)
    settings.check_gateways(gateways)
    now = serving.find(client.dashboard, APPLICATION)
    if now is not None and port not in (None, _port(now.url)):
        raise ClusterError(
            f"It is served at {now.url}.", hint="`adaptory down`, then `adaptory up` with the other port."
        )
    references = list(bases) or trained_bases(db) or [DEFAULT_BASE]
    port = port or (_port(now.url) if now else FIRST_PORT if settings.remote else _free_port())
    chosen = _engine(engine, settings)
    plan = {
        "port": port,
        "dtype": dtype,
        "gateways": gateways,
        "models": [_model(each) | chosen | {"replicas": scale} for each in references],
        "idle_seconds": idle_seconds,
        "trusted_keys": _trusted(keys),
    } | dict(sizes or {})
    if now is not None and now.running and client.newest(_JOB) == _command(plan):
        return now
    say(f"Starting to serve {', '.join(references)} (a minute or so; `adaptory down` stops it)…")
    return deploy(client, settings, store, plan)


def deploy(client: RayJobClient, settings: Settings, store: Store, plan: dict[str, Any]) -> Application:
    """Have a `serving.plan.Plan` on the cluster; returns when it answers.

    Raises:
        ClusterError: it cannot be deployed; the message says why.
    """
    from cluster import serving

    _run(client, settings, store, _JOB, _command(plan), failing="Serving cannot start")
    started = serving.find(client.dashboard, APPLICATION)
    if started is None or not started.running:
        raise ClusterError(f"Serving was deployed and does not run: {started.message if started else 'it is gone'}.")
    return started


def drain(client: RayJobClient, settings: Settings, store: Store, seconds: float) -> None:
    """Have the gateways refuse what is new, and wait for what they had begun, at most so long.

    Raises:
        ClusterError: they cannot be asked.
    """
    say(f"Waiting for what is being answered, at most {seconds:g} s (`--force` does not)…")
    command = shlex.join(["python", "-m", "serving", "--drain", f"{seconds:g}"])
    _run(client, settings, store, "drain-", command, failing="Serving cannot be drained")


def parse_replicas(text: str) -> dict[str, int]:
    """
    Raises:
        UsageError: neither a number nor two with a colon between.
    """
    least, colon, most = text.partition(":")
    try:
        found = {"min": int(least), "max": int(most if colon else least)}
    except ValueError:
        found = {"min": 0, "max": -1}
    if not 0 <= found["min"] <= found["max"] or not found["max"]:
        raise UsageError(
            f"{text!r} is no number of replicas.", hint="Write 2 for two, 1:4 for one to four, 0:2 for none while idle."
        )
    return found


def first_key(db: Database, tenant: str, *, actor: str) -> IssuedKey | None:
    """A key for a tenant that has none; it is shown once, by who calls this."""
    from orchestrator.tenants.keys import KeyState, create_key, list_keys
    from orchestrator.tenants.tenant import ensure_tenant

    ensure_tenant(db, tenant, actor=actor)
    if any(key.state() is KeyState.ACTIVE for key in list_keys(db, tenant=tenant)):
        return None
    return create_key(db, tenant, "first", actor=actor)


def metrics_key(settings: Settings) -> str:
    """The file with the key that Prometheus shows at /metrics, made on first use; a local gateway reads it there."""
    file = settings.metrics_key_file
    if not file.exists():
        settings.keys.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(32) + "\n")
    return str(file)


def trained_bases(db: Database) -> list[str]:
    """References of the base models that adapters belong to, each digest once."""
    from sqlalchemy import select

    from orchestrator.db.models import AdapterRow

    with db.read() as session:
        rows = session.execute(select(AdapterRow.base_digest, AdapterRow.provenance).order_by(AdapterRow.created_at))
        found = [(digest, _base_reference(provenance)) for digest, provenance in rows]
    return list({digest: reference for digest, reference in found if digest and reference}.values())


def _base_reference(provenance: dict[str, Any]) -> str | None:
    """In what is published the summary's short form covers the provenance's record; an adapter without a summary has that.
    Of an adapter that was imported by its base's digest alone nobody knows where the base is."""
    base = provenance.get("base_model")
    found = base.get("reference") if isinstance(base, dict) else base
    return None if found is None or found.startswith("sha256:") else found


# --- details --------------------------------------------------------------------------------------------------------


def _engine(name: EngineName, settings: Settings) -> dict[str, dict[str, str]]:
    """What a model's part of the plan says of it (`serving.engine.choice`); our own needs no word."""
    if name is EngineName.ADAPTORY:
        return {}
    from cluster.other_python import vllm_python

    return {"engine": {"type": name, "python": vllm_python(settings)}}


def _command(plan: dict[str, Any]) -> str:
    return shlex.join(["python", "-m", "serving", "--plan", json.dumps(plan)])


def _model(reference: str) -> dict[str, str]:
    """What clients call it: its name in the catalogue or on the hub, a directory's last part."""
    from orchestrator.modeling.catalogue import CATALOGUE

    names = {target: name for name, target in CATALOGUE.items()}
    plain = reference.removesuffix("/").removesuffix(".gguf")
    name = names.get(reference, plain.rpartition("/")[2] if plain.startswith(("/", ".", "~", "s3:")) else plain)
    return {"name": name, "reference": reference}


def _trusted(keys: Keys) -> list[str]:
    """With our own, made now if it is new: what is trained or imported later is signed by it, and is to be served."""
    keys.public()
    return [key.decode() for key in keys.trust().keys]


def _environment(settings: Settings, store: Store) -> dict[str, str]:
    """Never a secret, since Ray shows it: a database's password comes from the nodes' own environment."""
    from sqlalchemy import make_url

    from orchestrator.runs.launch import job_env

    secret = make_url(settings.database).password is not None
    return job_env(settings, store) | ({} if secret else {"ADAPTORY_DATABASE_URL": settings.database})


def _run(client: RayJobClient, settings: Settings, store: Store, prefix: str, command: str, failing: str) -> None:
    """
    Raises:
        ClusterError: the job fails; it begins with `failing`.
    """
    job = f"{prefix}{secrets.token_hex(4)}"
    client.submit(job, command, env=_environment(settings, store), metadata={"adaptory": "serving"})
    _wait(client, job, failing)


def _wait(client: RayJobClient, job: str, failing: str) -> None:
    from orchestrator.runs.client import JobStatus

    told = 0
    while True:
        state = client.status(job)
        lines = client.logs(job).splitlines()
        for line in lines[told:]:
            if line.startswith("serving: "):
                say(line.removeprefix("serving: "))
        told = len(lines)
        if state is not None and state[0].final:
            break
        time.sleep(_POLL_SECONDS)
    if state[0] is not JobStatus.SUCCEEDED:
        telling = [line for line in lines if "Error" in line]
        raise ClusterError(
            f"{failing}: {(telling or lines or [state[1]])[-1][:500]}",
            hint=f"The whole output is in Ray's dashboard, under job {job}.",
            job=job,
        )


def _port(url: str) -> int:
    return int(url.removesuffix("/v1").rpartition(":")[2])


def _free_port() -> int:
    for port in range(FIRST_PORT, FIRST_PORT + 100):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise ClusterError(f"No port from {FIRST_PORT} on is free.", hint="Name one: `adaptory up --port 9000`.")
