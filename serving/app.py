"""The composition root of serving: settings and database → a Ray Serve application of gateways and engines.

`python -m serving` deploys it and ends; what it deployed stays. It runs as a Ray job, so that the cluster gets this very
code, wherever it is.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig

from orchestrator.db import Database, open_database
from orchestrator.limits.limiter import Limiter, LocalLimiter
from orchestrator.limits.shared import TTL, SharedLimiter
from orchestrator.modeling.base_model import materialize
from orchestrator.modeling.model_files import read_config
from orchestrator.modeling.prompts import load_tokenizer
from orchestrator.routing.table import RouteTable, build_table
from orchestrator.routing.watcher import RouteWatcher
from orchestrator.settings import Settings, load_settings
from orchestrator.store import Store
from orchestrator.tenants.keys import authenticate
from orchestrator.tenants.usage import UsageWriter
from serving.adapter_router import REPLICAS, RESIDENCY_SECONDS, AdapterRouter
from serving.background import Repeated
from serving.engine.protocol import GenerateRequest
from serving.gateway.app import create_app
from serving.gateway.gateway import Gateway, ServedBase
from serving.gateway.prompts import Prompts
from serving.handles import HandleEngine
from serving.known_adapters import KnownAdapters
from serving.replica import EngineOptions, EngineReplica
from serving.wire import Item

log = logging.getLogger(__name__)

APPLICATION = "adaptory"
"""Serve's name of it all."""

USAGE_SECONDS = 2.0
"""Between two times that usage is stored; what a killed gateway had not stored is lost."""

_DRAIN_SECONDS = 60.0
"""For what is being answered when a replica must go."""


class ServedModel(BaseModel):
    """A base model to serve."""

    model_config = ConfigDict(frozen=True)

    name: str
    """As clients call it."""
    reference: str
    replicas: int = 1


class Plan(BaseModel):
    """What to deploy; JSON, from who starts `serving`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = 8000
    models: tuple[ServedModel, ...]
    dtype: str = "bfloat16"
    max_length: int = 4096
    max_sequences: int = 32
    threads: int | None = None
    """Of each engine; None: all cores."""


@dataclass(frozen=True)
class _Base:
    model: ServedModel
    digest: str
    max_length: int


# --- gateway --------------------------------------------------------------------------------------------------------


@serve.ingress()
class GatewayReplica:
    """One gateway process."""

    def __init__(self, bases: list[_Base], engines: dict[str, Any]):
        _log_lines()
        settings = load_settings()
        self._db = db = open_database(settings.database)
        served = {base.digest: _served(settings, base, engines[base.digest]) for base in bases}
        names = {base.name: base.digest for base in served.values()}
        adapters, usage = KnownAdapters(db), UsageWriter(db)
        ahead = Prefetching(engines, adapters.bases)
        self._routes = RouteWatcher(db, lambda: build_table(db, adapters, names), replaced=ahead.follow)
        self._routes.start()
        self._repeated = [Repeated(USAGE_SECONDS, usage.flush, last=True)]
        self._gateway = Gateway(
            authenticate=lambda key: authenticate(db, key),
            routes=lambda: self._routes.table,
            bases=served,
            limiter=self._limiter(settings, db),
            usage=usage,
            metrics_key=_metrics_key(settings),
            replicas=lambda: REPLICAS,
            proxied=True,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._gateway)

    def _limiter(self, settings: Settings, db: Database) -> Limiter:
        """SQLite has one gateway process, whose memory is enough; any number share a PostgreSQL."""
        if settings.database.startswith("sqlite"):
            return LocalLimiter()
        shared = SharedLimiter(db)
        self._repeated.append(Repeated(TTL / 3, shared.renew))
        return shared

    def __del__(self) -> None:
        """Serve calls it when the replica has drained: what was used is stored before it goes."""
        for repeated in getattr(self, "_repeated", ()):
            repeated.close()
        if hasattr(self, "_routes"):
            self._routes.stop()
        if hasattr(self, "_db"):
            self._db.close()


class Prefetching:
    """When routes change, tells the replicas of what was not routed to before, so that the first request finds it there."""

    def __init__(self, engines: Mapping[str, Any], bases: Mapping[str, str]):
        """
        Args:
            engines: handles, by base digest.
            bases: of each adapter's digest.
        """
        self._engines, self._bases = engines, bases
        self._known: frozenset[str] = frozenset()

    def follow(self, table: RouteTable) -> None:
        new, self._known = table.adapters() - self._known, table.adapters()
        for digest in sorted(new):
            if (handle := self._engines.get(self._bases.get(digest, ""))) is not None:
                handle.prefetch.remote(adapter=digest)


def _served(settings: Settings, base: _Base, handle: Any) -> ServedBase:
    found = materialize(base.model.reference, cache=settings.cache, store=Store(settings.store))
    prompts = Prompts(load_tokenizer(found.path), base.max_length)
    return ServedBase(base.model.name, base.digest, prompts, HandleEngine(handle))


def _metrics_key(settings: Settings) -> str | None:
    """What `adaptory up` has put there; without it nobody reads the metrics."""
    try:
        return (settings.keys / "metrics_key").read_text().strip() or None
    except OSError:
        return None


def _log_lines() -> None:
    """One line of JSON for each request, on this process's stderr, which Ray keeps in its logs."""
    logger = logging.getLogger("serving.requests")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


# --- engines --------------------------------------------------------------------------------------------------------


class ServedEngine:
    """A replica of an engine, as Serve calls it."""

    async def __init__(self, options: EngineOptions):  # type: ignore[misc]  # Serve awaits it
        self._replica = EngineReplica(options, serve.get_replica_context().replica_id.unique_id, _leave)
        await self._replica.start()

    async def answer(self, request: GenerateRequest, stream: bool) -> AsyncGenerator[Item, None]:
        async with contextlib.aclosing(self._replica.answer(request, stream)) as items:
            async for item in items:
                yield item

    async def prefetch(self, adapter: str) -> None:
        self._replica.prefetch(adapter)

    def record_routing_stats(self) -> dict[str, Any]:
        return self._replica.residency()

    def check_health(self) -> None:
        self._replica.check()

    async def __del__(self) -> None:
        if hasattr(self, "_replica"):
            await self._replica.close()


def _leave() -> None:
    """A replica whose engine is dead dies with it: that is noticed at once and by all, while three failed looks at its
    health take a quarter of a minute, in which it draws requests, being idle."""
    logging.shutdown()
    os._exit(1)


# --- the application ------------------------------------------------------------------------------------------------


def application(plan: Plan, settings: Settings) -> Any:
    """Gateways over one deployment of engines for each base model.

    Raises:
        ModelError, PackageError: a base model cannot be had.
    """
    bases = [_known(model, plan, settings) for model in plan.models]
    engines = {base.digest: _engine(base, plan, settings) for base in bases}
    gateway = serve.deployment(
        name="gateway",
        num_replicas=1,
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        ray_actor_options=_actor(plan),
    )
    return _versioned(gateway(GatewayReplica), bases).bind(bases, engines)


def _known(model: ServedModel, plan: Plan, settings: Settings) -> _Base:
    store = Store(settings.store)
    found = materialize(model.reference, cache=settings.cache, store=store, say=log.info)
    positions = read_config(found.path, model.reference).get("max_position_embeddings") or plan.max_length
    return _Base(model, found.digest, min(plan.max_length, int(positions)))


def _engine(base: _Base, plan: Plan, settings: Settings) -> Any:
    options = EngineOptions(
        reference=base.model.reference,
        digest=base.digest,
        store_url=settings.store,
        cache=settings.cache,
        dtype=plan.dtype,
        max_length=base.max_length,
        max_sequences=plan.max_sequences,
        threads=plan.threads,
    )
    router = RequestRouterConfig.model_validate(
        {
            "request_router_class": AdapterRouter,
            "request_router_kwargs": {"full_batch": plan.max_sequences},
            "request_routing_stats_period_s": RESIDENCY_SECONDS,
        }
    )
    engine = serve.deployment(
        name=f"engine-{base.digest.removeprefix('sha256:')[:12]}",
        num_replicas=base.model.replicas,
        max_ongoing_requests=4 * plan.max_sequences,
        max_queued_requests=8 * plan.max_sequences,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        health_check_period_s=5.0,
        request_router_config=router,
        ray_actor_options=_actor(plan, gpus=1 if _gpus() else 0),
    )
    return _versioned(engine(ServedEngine), options).bind(options)


def _versioned(deployment: Any, arguments: Any) -> Any:
    """With a version that is another one only when the code or what a replica is made of has changed. Serve would draw one
    by lot, and so replace every replica of everything at each deploy; its public way to name one is gone since 2.60."""
    code = ray.get_runtime_context().runtime_env.get("working_dir")
    version = hashlib.sha256(f"{code} {arguments!r}".encode()).hexdigest()[:16]
    return deployment.options(version=version, _internal=True)


def _actor(plan: Plan, gpus: int = 0) -> dict[str, Any]:
    """Reserves no CPU: a reserved one is one that no job on a small machine can have, used or not. And a reservation of
    none has Ray set OMP_NUM_THREADS to 1, which is for the engine to say."""
    inherited = ray.get_runtime_context().runtime_env.get("env_vars") or {}  # of this job: where state is
    environment = {"OMP_NUM_THREADS": str(plan.threads or os.cpu_count() or 1)} | inherited
    return {"num_cpus": 0, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


def _gpus() -> float:
    return ray.cluster_resources().get("GPU", 0)


def deploy(plan: Plan) -> None:
    """Start or change it; returns when it answers. Replicas whose part of the plan is the same stay as they are.

    Raises:
        RuntimeError: a replica cannot start; the message says why.
    """
    ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=plan.host, port=plan.port, keep_alive_timeout_s=75),
    )
    serve.run(application(plan, load_settings()), name=APPLICATION, route_prefix="/")


def main() -> None:
    """Entry of the Ray job; whoever waits for it reads what it logs."""
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("serving: %(message)s"))
    log.addHandler(handler)
    parser = argparse.ArgumentParser(prog="python -m serving", description="Deploy the serving application.")
    parser.add_argument("--plan", required=True, type=Plan.model_validate_json, help="as JSON")
    deploy(parser.parse_args().plan)
    log.info("It serves.")
