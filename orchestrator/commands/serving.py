"""Starting and showing the serving application: a Ray job deploys it (`python -m serving`), and Ray Serve keeps it."""

from __future__ import annotations

import json
import secrets
import shlex
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.commands.output import say
from orchestrator.errors import ClusterError

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
    keys: Keys,
) -> Application:
    """Deploy the application, or change what runs to what is asked for; returns when it answers.

    Args:
        bases: references of base models; none: those that adapters were trained on.
        port: None: that which it has, else the first that is free.
        dtype: of weights and caches: `bfloat16` or `float32`.
        keys: adapters that these have signed are served, others refused. Only public keys leave this machine.

    Raises:
        ClusterError: it cannot be deployed; the message says why.
        KeyUnusable: the signing key or a trusted one cannot be read.
    """
    from cluster import serving

    now = serving.find(client.dashboard, APPLICATION)
    if now is not None and port not in (None, _port(now.url)):
        raise ClusterError(
            f"It is served at {now.url}.", hint="`adaptory down`, then `adaptory up` with the other port."
        )
    references = list(bases) or trained_bases(db) or [DEFAULT_BASE]
    port = port or (_port(now.url) if now else FIRST_PORT if settings.remote else _free_port())
    plan = {
        "port": port,
        "dtype": dtype,
        "models": [_model(each) for each in references],
        "trusted_keys": _trusted(keys),
    }
    command = shlex.join(["python", "-m", "serving", "--plan", json.dumps(plan)])
    if now is not None and now.running and client.newest(_JOB) == command:
        return now
    say(f"Starting to serve {', '.join(references)} (a minute or so; `adaptory down` stops it)…")
    job = f"{_JOB}{secrets.token_hex(4)}"
    client.submit(job, command, env=_environment(settings, store), metadata={"adaptory": "serving"})
    _wait(client, job)
    started = serving.find(client.dashboard, APPLICATION)
    if started is None or not started.running:
        raise ClusterError(f"Serving was deployed and does not run: {started.message if started else 'it is gone'}.")
    return started


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
    file = settings.keys / "metrics_key"
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


def _wait(client: RayJobClient, job: str) -> None:
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
            f"Serving cannot start: {(telling or lines or [state[1]])[-1][:500]}",
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
