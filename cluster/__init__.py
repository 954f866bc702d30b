"""Reaches Ray: starts a local one, connects to one that is there, submits jobs to it, and asks what it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.settings import Settings

if TYPE_CHECKING:
    from cluster.jobs import RayJobClient

__all__ = ["connect", "connect_if_running"]


def connect(settings: Settings, *, say: Callable[[str], None] = lambda _: None) -> RayJobClient:
    """A client of the cluster that the settings name; the local one is started if it does not run.

    Args:
        say: told in a sentence when something takes time, such as starting Ray.

    Raises:
        ClusterError: the cluster cannot be reached or started, or refuses the token.
    """
    if settings.remote:
        return _remote(settings)
    from cluster import local
    from cluster.jobs import RayJobClient

    return RayJobClient(local.start(settings, say=say).dashboard(), local=True)


def connect_if_running(settings: Settings) -> RayJobClient | None:
    """The same without starting anything: None when the local Ray does not run.

    Raises:
        ClusterError: a remote cluster cannot be reached or refuses the token.
    """
    if settings.remote:
        return _remote(settings)
    from cluster import local
    from cluster.jobs import RayJobClient

    found = local.find(settings)
    return RayJobClient(found.dashboard(), local=True) if found else None


def _remote(settings: Settings) -> RayJobClient:
    from cluster.dashboard import Dashboard, ray_token
    from cluster.jobs import RayJobClient

    assert settings.ray_address is not None
    token, source = ray_token()
    dashboard = Dashboard(settings.ray_address, token, token_source=source)
    dashboard.version()
    return RayJobClient(dashboard, local=False)
