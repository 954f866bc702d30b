"""Ray Serve on a cluster, as its dashboard tells it: what runs, where it answers, and its end."""

from __future__ import annotations

import contextlib
import time

from pydantic import BaseModel

from cluster.dashboard import Dashboard
from orchestrator.errors import ClusterError

_PATH = "/api/serve/applications/"
_STOP_SECONDS = 90.0


class Deployment(BaseModel):
    name: str
    status: str
    """Serve's: HEALTHY, UPDATING, UNHEALTHY, …"""
    replicas: dict[str, int]
    """How many are in which state: RUNNING, STARTING, …"""
    message: str = ""


class Application(BaseModel):
    """The serving application."""

    status: str
    """Serve's: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, …"""
    message: str = ""
    url: str
    """Where OpenAI's clients point to: it ends with /v1."""
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
    deployments = [
        Deployment(
            name=each["name"],
            status=each["status"],
            replicas=_states(each.get("replicas") or []),
            message=each["message"],
        )
        for each in (found.get("deployments") or {}).values()
    ]
    http = details.get("http_options") or {}
    url = f"http://{http.get('host') or '127.0.0.1'}:{http.get('port') or 8000}/v1"
    return Application(status=found["status"], message=found.get("message") or "", url=url, deployments=deployments)


def stop(dashboard: Dashboard) -> None:
    """End all of Serve on the cluster, each replica when it has answered what it is answering.

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


def _states(replicas: list[dict[str, str]]) -> dict[str, int]:
    states = [replica["state"] for replica in replicas]
    return {state: states.count(state) for state in sorted(set(states))}
