"""Ray Serve on a cluster, as its dashboard and the gateways tell it: what runs, where it answers, how busy it is, and its end."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import requests
from pydantic import BaseModel

from cluster.dashboard import Dashboard
from orchestrator.errors import ClusterError

_PATH = "/api/serve/applications/"
_STOP_SECONDS = 90.0
_STATUS_SECONDS = 3.0


class Load(BaseModel):
    """What a replica of an engine told a gateway last, at most a second ago."""

    running: int
    """Requests that are answered."""
    waiting: int
    waiting_tokens: int
    """Of prompts, still to be read."""
    cache_tokens: int
    cache_tokens_used: int
    cache_bytes: int
    """Of the key-value cache at its capacity."""
    adapters: list[str]
    """Digests in the engine."""
    adapters_in_memory: int
    adapter_bytes: int
    """Of adapters in memory."""


class Replica(BaseModel):
    id: str
    state: str
    """Serve's: RUNNING, STARTING, STOPPING, …"""
    load: Load | None = None
    """None of a gateway, of an engine that was asked nothing yet, and where no gateway could be asked."""


class Deployment(BaseModel):
    name: str
    status: str
    """Serve's: HEALTHY, UPDATING, UNHEALTHY, UPSCALING, …"""
    model: str | None = None
    """That its engines serve, as clients call it; None where no gateway could be asked."""
    wanted: int
    """Replicas that Serve aims at."""
    replicas: list[Replica]
    message: str = ""

    @property
    def states(self) -> dict[str, int]:
        """How many replicas are in which state."""
        states = [replica.state for replica in self.replicas]
        return {state: states.count(state) for state in sorted(set(states))}


class Application(BaseModel):
    """The serving application."""

    status: str
    """Serve's: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, …"""
    message: str = ""
    url: str
    """Where OpenAI's clients point to: it ends with /v1."""
    in_flight: int | None = None
    """Requests that the gateway which was asked is answering; None where none could be asked."""
    deployments: list[Deployment]

    @property
    def running(self) -> bool:
        return self.status == "RUNNING"


def find(dashboard: Dashboard, name: str) -> Application | None:
    """The application of this name; None when there is none.

    Raises:
        ClusterError: the cluster does not answer.
    """
    details = dashboard.get(_PATH).json()
    found = (details.get("applications") or {}).get(name)
    if found is None:
        return None
    http = details.get("http_options") or {}
    return Application(
        status=found["status"],
        message=found.get("message") or "",
        url=f"http://{http.get('host') or '127.0.0.1'}:{http.get('port') or 8000}/v1",
        deployments=[_deployment(each) for each in (found.get("deployments") or {}).values()],
    )


def with_loads(application: Application, key: str) -> Application:
    """The same with what a gateway knows; as it was where none answers.

    Args:
        key: that of the metrics.
    """
    url = application.url.removesuffix("/v1") + "/status"
    try:
        answer = requests.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=_STATUS_SECONDS)
        told = answer.json() if answer.ok else None
    except (requests.RequestException, ValueError):
        told = None
    if told is None:
        return application
    deployments = [
        each.model_copy(
            update={
                "model": told["models"].get(each.name),
                "replicas": [_loaded(replica, told["engines"].get(each.name) or {}) for replica in each.replicas],
            }
        )
        for each in application.deployments
    ]
    return application.model_copy(update={"in_flight": told["in_flight"], "deployments": deployments})


def stop(dashboard: Dashboard) -> None:
    """End all of Serve on the cluster. Its proxies go at once, and with them whatever is still being answered: `serving`'s own
    drain comes before.

    Raises:
        ClusterError: it is still there after a while.
    """
    with contextlib.suppress(
        ClusterError
    ):  # it answers when all is over, which may be later than we wait for one answer
        dashboard.delete(_PATH)
    deadline = time.monotonic() + _STOP_SECONDS
    while dashboard.get(_PATH).json().get("applications"):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"Serving did not stop within {_STOP_SECONDS:.0f} s.",
                hint="`adaptory down --force` does not wait for it.",
            )
        time.sleep(0.2)


def _deployment(details: dict[str, Any]) -> Deployment:
    replicas = [Replica(id=each["replica_id"], state=each["state"]) for each in details.get("replicas") or []]
    return Deployment(
        name=details["name"],
        status=details["status"],
        wanted=details.get("target_num_replicas", len(replicas)),
        replicas=replicas,
        message=details["message"],
    )


def _loaded(replica: Replica, told: dict[str, Any]) -> Replica:
    """
    Args:
        told: of each replica, `serving.replica.EngineReplica.residency`.
    """
    mine = told.get(replica.id)
    if not mine:
        return replica
    load = Load(
        **{name: value for name, value in mine["stats"].items() if name in Load.model_fields},
        adapters=mine["engine"],
        adapters_in_memory=len(mine["memory"]),
        adapter_bytes=mine["cache"]["memory_bytes"],
    )
    return replica.model_copy(update={"load": load})
