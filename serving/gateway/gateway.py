"""What the gateway works with, handed to it by who composes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.limits.limiter import Limiter
from orchestrator.routing.table import RouteTable
from orchestrator.tenants.keys import Principal
from serving.gateway.full import FullEngines
from serving.gateway.metrics import Metrics, Replicas
from serving.gateway.ports import BaseEngine, UsageSink
from serving.gateway.prompts import Prompts


@dataclass
class Arriving:
    """Bodies that are being read."""

    bytes: int = 0


@dataclass(frozen=True)
class Bounds:
    """What one request may take, whoever asks."""

    body_bytes: int = 4 << 20
    bodies_bytes: int = 256 << 20
    """Of all that are being read: thousands of slow ones would otherwise fill the memory."""
    body_seconds: float = 20.0
    """For the body to arrive in."""
    send_seconds: float = 60.0
    """For a piece of the answer to be taken in; who reads nothing for so long is gone."""


@dataclass(frozen=True)
class ServedBase:
    """A base model that is served."""

    name: str
    """As clients call it."""
    digest: str
    prompts: Prompts
    engine: BaseEngine


@dataclass(frozen=True)
class Gateway:
    authenticate: Callable[[str], Principal]
    """From a presented key; may wait for a database, so it is called on a thread. Raises ApiKeyRefused."""
    routes: Callable[[], RouteTable]
    """The table that is in force; a request keeps the one that it began with."""
    bases: Mapping[str, ServedBase]
    """By digest."""
    limiter: Limiter
    usage: UsageSink
    metrics_key: str | None = None
    """Who shows it may read the metrics of all tenants; None: nobody."""
    bounds: Bounds = Bounds()
    arriving: Arriving = field(default_factory=Arriving)
    full: FullEngines = field(default_factory=FullEngines)
    metrics: Metrics = field(default_factory=Metrics)
    replicas: Callable[[], Replicas] = dict
    """What the engines' replicas told last, for the metrics."""
    deployments: Mapping[str, str] = field(default_factory=dict)
    """Of those replicas → the base that they serve, as clients call it."""
    ready: Callable[[], bool] = lambda: True
    """Whether requests should come here; when not, new ones are refused, and those that have begun are answered."""
    proxied: bool = False
    """Behind a proxy that gives requests their ids: see `app.RequestIds`."""
    started_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
