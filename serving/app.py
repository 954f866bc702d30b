"""The composition root of serving: settings and database → a Ray Serve application of gateways and engines.

`python -m serving --plan …` deploys it and ends; what it deployed stays. `--drain` has it answer what it is answering and
nothing more. Both run as a Ray job, so that the cluster gets this very code, wherever it is.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import ControllerOptions, HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError

from orchestrator.db import Database, open_database
from orchestrator.limits.limiter import Limiter, LocalLimiter
from orchestrator.limits.shared import TTL, SharedLimiter
from orchestrator.modeling.base_model import materialize
from orchestrator.modeling.model_files import read_config
from orchestrator.modeling.prompts import load_tokenizer
from orchestrator.registry.signing import Trust
from orchestrator.routing.table import RouteTable, build_table
from orchestrator.routing.watcher import RouteWatcher
from orchestrator.settings import Settings, load_settings
from orchestrator.store import Store
from orchestrator.tenants.keys import authenticate
from orchestrator.tenants.usage import UsageWriter
from serving.adapter_router import RESIDENCY_SECONDS, AdapterRouter
from serving.background import Repeated
from serving.gateway.app import create_app
from serving.gateway.full import FullEngines
from serving.gateway.gateway import Gateway, ServedBase
from serving.gateway.prompts import Prompts
from serving.handles import HandleEngine
from serving.known_adapters import KnownAdapters
from serving.mail import Postbox, open_postbox
from serving.plan import Plan, ServedModel
from serving.replica import EngineOptions
from serving.residency import REPLICAS
from serving.scaling import actor_options, engine_scaling, gateway_scaling, reserved_gpus
from serving.served_engine import ServedEngine
from serving.shortcut import CALLBACK, open_door

log = logging.getLogger(__name__)

APPLICATION = "adaptory"
"""Serve's name of it all."""

USAGE_SECONDS = 2.0
"""Between two times that usage is stored: of a gateway that is killed, requests that ended in this time (and while the database
did not answer) are not counted. One that is drained, replaced or scaled away stores all before it goes."""

_GATEWAY = "gateway"
_ASKED_SECONDS = 0.5
"""Between two questions whether gateways still answer."""


@dataclass(frozen=True)
class _Base:
    """What a gateway knows of a base: not how many replicas there are, or each change of that would replace the gateways."""

    name: str
    reference: str
    digest: str
    max_length: int
    sleeps: bool
    """It may have no replica."""

    @property
    def deployment(self) -> str:
        return f"engine-{self.digest.removeprefix('sha256:')[:12]}"


# --- gateway --------------------------------------------------------------------------------------------------------


@serve.ingress()
class GatewayReplica:
    """One gateway process."""

    async def __init__(self, bases: list[_Base], engines: dict[str, Any]):  # type: ignore[misc]  # Serve awaits it
        _log_lines()
        settings = load_settings()
        self._db = db = open_database(settings.database)
        self._postbox = await open_postbox()
        served = {base.digest: _served(settings, base, engines[base.digest], self._postbox) for base in bases}
        names = {base.name: base.digest for base in served.values()}
        adapters, usage = KnownAdapters(db), UsageWriter(db)
        self._usage, self._draining = usage, False
        ahead = Prefetching(engines, adapters.bases, awake=_awake(bases), loop=asyncio.get_running_loop())
        self._routes = RouteWatcher(db, lambda: build_table(db, adapters, names), replaced=ahead.follow)
        self._routes.start()
        self._repeated = [Repeated(USAGE_SECONDS, usage.flush, last=True)]
        self._gateway = Gateway(
            authenticate=lambda key: authenticate(db, key),
            routes=lambda: self._routes.table,
            bases=served,
            limiter=self._limiter(settings, db),
            usage=usage,
            full=FullEngines(),
            metrics_key=settings.metrics_key,
            replicas=lambda: REPLICAS,
            deployments={base.deployment: base.name for base in bases},
            ready=lambda: not self._draining,
            proxied=True,
        )
        self._app = create_app(self._gateway)
        self._door = await open_door(self._app)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def drain(self) -> int:
        """Refuse what is new; how many answers still run. When none does, all that was used is stored."""
        self._draining = True
        if not (running := self._gateway.metrics.running):
            await asyncio.to_thread(self._usage.flush)
        return running

    def _limiter(self, settings: Settings, db: Database) -> Limiter:
        """SQLite has one gateway process, whose memory is enough; any number share a PostgreSQL."""
        if settings.database.startswith("sqlite"):
            return LocalLimiter()
        shared = SharedLimiter(db)
        self._repeated.append(Repeated(TTL / 3, shared.renew))
        return shared

    async def __del__(self) -> None:
        """Serve calls it when what came its way is answered: what was used is stored before it goes."""
        if (door := getattr(self, "_door", None)) is not None:
            await door.close()
        if (postbox := getattr(self, "_postbox", None)) is not None:
            postbox.close()
        for repeated in getattr(self, "_repeated", ()):
            repeated.close()
        if hasattr(self, "_routes"):
            self._routes.stop()
        if hasattr(self, "_db"):
            self._db.close()


class Prefetching:
    """When routes change, tells the replicas of what was not routed to before, so that the first request finds it there."""

    def __init__(
        self,
        engines: Mapping[str, Any],
        bases: Mapping[str, str],
        awake: Callable[[str], bool],
        loop: asyncio.AbstractEventLoop,
    ):
        """
        Args:
            loop: where handles live; routes are watched on a thread.
            engines: handles, by base digest.
            bases: of each adapter's digest.
            awake: whether a base has replicas; telling one that has none would start it.
        """
        self._engines, self._bases, self._awake = engines, bases, awake
        self._loop = loop
        self._known: frozenset[str] = frozenset()

    def follow(self, table: RouteTable) -> None:
        new, self._known = table.adapters() - self._known, table.adapters()
        for digest in sorted(new):
            base = self._bases.get(digest, "")
            if (handle := self._engines.get(base)) is not None and self._awake(base):
                self._loop.call_soon_threadsafe(self._tell, handle, digest)

    def _tell(self, handle: Any, digest: str) -> None:
        handle.prefetch.remote(adapter=digest)


def _awake(bases: Collection[_Base]) -> Callable[[str], bool]:
    sleeping = {base.digest: base.deployment for base in bases if base.sleeps}
    return lambda digest: digest not in sleeping or bool(REPLICAS.get(sleeping[digest]))


def _served(settings: Settings, base: _Base, handle: Any, postbox: Postbox | None) -> ServedBase:
    found = materialize(base.reference, cache=settings.cache, store=Store(settings.store))
    prompts = Prompts(load_tokenizer(found.path), base.max_length)
    engine = HandleEngine(handle, postbox=postbox, replicas=lambda: REPLICAS.get(base.deployment, ()))
    return ServedBase(base.name, base.digest, prompts, engine)


def _log_lines() -> None:
    """One line of JSON for each request, on this process's stderr, which Ray keeps in its logs."""
    logger = logging.getLogger("serving.requests")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


# --- the application ------------------------------------------------------------------------------------------------


def application(plan: Plan, settings: Settings) -> Any:
    """Gateways over one deployment of engines for each base model.

    Raises:
        ModelError, PackageError: a base model cannot be had.
        SettingsError: several gateways over SQLite.
    """
    settings.check_gateways(plan.gateways)
    bases = [_known(model, plan, settings) for model in plan.models]
    engines = {
        base.digest: _engine(base, model, plan, settings) for base, model in zip(bases, plan.models, strict=True)
    }
    gateway = serve.deployment(
        name=_GATEWAY,
        max_ongoing_requests=4096,
        ray_actor_options=actor_options(plan, 0, _inherited()),
        **gateway_scaling(plan.gateways),
    )
    return _versioned(gateway(GatewayReplica), bases).bind(bases, engines)


def _known(model: ServedModel, plan: Plan, settings: Settings) -> _Base:
    store = Store(settings.store)
    found = materialize(model.reference, cache=settings.cache, store=store, say=log.info)
    positions = read_config(found.path, model.reference).get("max_position_embeddings") or plan.max_length
    longest = min(plan.max_length, int(positions))
    return _Base(model.name, model.reference, found.digest, longest, sleeps=model.replicas.min == 0)


def _engine(base: _Base, model: ServedModel, plan: Plan, settings: Settings) -> Any:
    options = EngineOptions(
        reference=base.reference,
        digest=base.digest,
        store_url=settings.store,
        cache=settings.cache,
        dtype=plan.dtype,
        max_length=base.max_length,
        max_sequences=plan.max_sequences,
        max_adapters=plan.max_adapters,
        memory_bytes=plan.adapter_bytes,
        threads=plan.threads,
        trust=Trust(tuple(key.encode() for key in plan.trusted_keys)),
        engine=model.engine,
    )
    router = RequestRouterConfig.model_validate(
        {
            "request_router_class": AdapterRouter,
            "request_router_kwargs": {"full_batch": plan.max_sequences},
            "request_routing_stats_period_s": RESIDENCY_SECONDS,
        }
    )
    gpus = reserved_gpus([node["Resources"] for node in ray.nodes() if node["Alive"]], model.engine)
    engine = serve.deployment(
        name=base.deployment,
        max_ongoing_requests=options.max_requests,
        max_queued_requests=8 * plan.max_sequences,
        health_check_period_s=5.0,
        request_router_config=router,
        ray_actor_options=actor_options(plan, gpus, _inherited(), model.engine),
        **engine_scaling(plan, model.replicas, gpus),
    )
    return _versioned(engine(ServedEngine), options).bind(options)


def _versioned(deployment: Any, arguments: Any) -> Any:
    """With a version that is another one only when the code or what a replica is made of has changed. Serve would draw one
    by lot, and so replace every replica of everything at each deploy; its public way to name one is gone since 2.60."""
    code = ray.get_runtime_context().runtime_env.get("working_dir")
    version = hashlib.sha256(f"{code} {arguments!r}".encode()).hexdigest()[:16]
    return deployment.options(version=version, _internal=True)


def _inherited() -> dict[str, str]:
    """The environment of this job: where state is."""
    return ray.get_runtime_context().runtime_env.get("env_vars") or {}


def deploy(plan: Plan) -> None:
    """Start or change it; returns when it answers. Replicas whose part of the plan is the same stay as they are.

    Raises:
        RuntimeError: a replica cannot start; the message says why.
    """
    _connect()
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=plan.host, port=plan.port, keep_alive_timeout_s=75),
        controller_options=ControllerOptions(runtime_env={"env_vars": CALLBACK}),  # its proxies inherit it
    )
    serve.run(application(plan, load_settings()), name=APPLICATION, route_prefix="/")


def drain(seconds: float) -> None:
    """Have all gateways refuse what is new, and wait until they have answered what they had begun, at most so long."""
    _connect()
    gateways, deadline = serve.get_deployment_handle(_GATEWAY, APPLICATION), time.monotonic() + seconds
    while running := _running(gateways):
        if time.monotonic() > deadline:
            log.info("%d answers still run after %g s, and are cut.", running, seconds)
            return
        time.sleep(_ASKED_SECONDS)


def _running(gateways: Any) -> int:
    """Answers that run; none where no gateway does."""
    try:
        return sum(gateways.broadcast("drain").results(timeout_s=10.0))
    except (RayActorError, DeploymentUnavailableError, TimeoutError) as error:
        log.warning("a gateway does not say what it answers: %s", error)
        return 0


def _connect() -> None:
    ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)


def main() -> None:
    """Entry of the Ray job; whoever waits for it reads what it logs."""
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("serving: %(message)s"))
    log.addHandler(handler)
    parser = argparse.ArgumentParser(
        prog="python -m serving", description="Deploy the serving application, or drain it."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Plan.model_validate_json, help="as JSON")
    what.add_argument("--drain", type=float, metavar="SECONDS", help="at most")
    options = parser.parse_args()
    if options.plan is None:
        drain(options.drain)
        return
    deploy(options.plan)
    log.info("It serves.")
