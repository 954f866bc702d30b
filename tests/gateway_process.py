"""The gateway over a real engine without Ray: what tests and benchmarks abuse. `python -m tests.gateway_process --help` serves one.

Everything is what production has but for Serve between gateway and replica: a call in the same process stands for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from orchestrator.db import open_database
from orchestrator.errors import AdaptoryError
from orchestrator.limits.limiter import LocalLimiter
from orchestrator.limits.shared import TTL, SharedLimiter
from orchestrator.modeling.base_model import materialize
from orchestrator.modeling.prompts import load_tokenizer
from orchestrator.registry.signing import Keys, Trust
from orchestrator.routing.table import build_table
from orchestrator.routing.watcher import RouteWatcher
from orchestrator.settings import load_settings
from orchestrator.store import Store
from orchestrator.tenants.keys import authenticate
from orchestrator.tenants.usage import UsageWriter
from serving.background import Repeated
from serving.engine.protocol import GenerateRequest, TokenEvent
from serving.gateway.app import create_app
from serving.gateway.gateway import Bounds, Gateway, ServedBase
from serving.gateway.ports import Running
from serving.gateway.prompts import Prompts
from serving.known_adapters import KnownAdapters
from serving.replica import EngineOptions, EngineReplica
from serving.wire import Begun

BASE = "tiny"
"""What clients call the base model."""
NOBODY = Trust(())


class InProcess:
    """A `BaseEngine` over one replica.

    Args:
        pause: seconds between two events, for answers that are still there when something happens to them.
    """

    def __init__(self, replica: EngineReplica, pause: float = 0.0):
        self._replica, self._pause = replica, pause

    async def begin(self, request: GenerateRequest, *, stream: bool) -> Running:
        items = self._replica.answer(request, stream)
        try:
            first = await anext(items)
        except BaseException:
            await items.aclose()
            raise
        if isinstance(first, AdaptoryError):
            raise first
        assert isinstance(first, Begun)
        return Running(first.replica, self._events(first.event, items), items.aclose)

    async def _events(self, first: TokenEvent, items: AsyncGenerator[Any, None]) -> AsyncIterator[TokenEvent]:
        yield first
        async for item in items:
            if isinstance(item, AdaptoryError):
                raise item
            await asyncio.sleep(self._pause)
            yield item


def replica(model: Path, home: Path, trust: Trust = NOBODY, **options: Any) -> EngineReplica:
    """An engine over a model in a directory; adapters come from `home`/store once it is started."""
    found = materialize(str(model), cache=home / "cache", store=Store(str(home / "store")))
    sizes: dict[str, Any] = {"dtype": "float32", "max_length": 512, "max_sequences": 8} | options
    return EngineReplica(
        EngineOptions(str(model), found.digest, str(home / "store"), home / "cache", trust, **sizes), "replica-1"
    )


@contextlib.contextmanager
def gateway(
    database: str,
    model: Path,
    engine: EngineReplica,
    *,
    ttl: float = TTL,
    pause: float = 0.0,
    bounds: Bounds | None = None,
) -> Iterator[Gateway]:
    """One gateway process's parts, as `serving.app.GatewayReplica` puts them together."""
    options = engine._options
    base = ServedBase(
        BASE, options.digest, Prompts(load_tokenizer(model), options.max_length), InProcess(engine, pause)
    )
    db = open_database(database)
    adapters, usage = KnownAdapters(db), UsageWriter(db)
    repeated = [Repeated(0.5, usage.flush, last=True)]
    limiter: LocalLimiter | SharedLimiter = LocalLimiter()
    if not database.startswith("sqlite"):
        limiter = shared = SharedLimiter(db, ttl=ttl)
        repeated.append(Repeated(ttl / 3, shared.renew))
    with RouteWatcher(db, lambda: build_table(db, adapters, {BASE: options.digest})) as routes:
        yield Gateway(
            authenticate=lambda key: authenticate(db, key),
            routes=lambda: routes.table,
            bases={options.digest: base},
            limiter=limiter,
            usage=usage,
            metrics_key="the-operators-own",
            bounds=bounds or Bounds(),
            replicas=lambda: {"engine": {engine.name: engine.residency()}},
        )
    for each in repeated:
        each.close()
    db.close()


def server(app: Any, port: int = 0) -> tuple[uvicorn.Server, int]:
    """uvicorn as Serve's proxy runs it, on a port of the loopback."""
    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    config = uvicorn.Config(app, log_level="error", lifespan="off", access_log=False, timeout_graceful_shutdown=5)
    made = uvicorn.Server(config)
    serve = made.serve
    made.serve = lambda sockets=None: serve(sockets=[listener])  # type: ignore[method-assign]
    return made, listener.getsockname()[1]


@contextlib.contextmanager
def served(app: Any) -> Iterator[int]:
    """Serves on a thread until the block ends; yields the port."""
    made, port = server(app)
    thread = threading.Thread(target=made.run, name="uvicorn")
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not made.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield port
    finally:
        made.should_exit = True
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--home", required=True, type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttl", type=float, default=TTL, help="seconds that a reservation outlives its gateway")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two tokens of a stream")
    parser.add_argument("--no-adapters", action="store_true", help="start no process that loads them")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    engine = replica(
        options.model,
        options.home,
        Keys.of(load_settings()).trust(),
        threads=1,
    )

    async def run() -> None:
        if not options.no_adapters:
            await engine.start()
        with gateway(options.database, options.model, engine, ttl=options.ttl, pause=options.pause) as made:
            serving, port = server(create_app(made), options.port)
            sys.stdout.write(f"{port}\n")
            sys.stdout.flush()
            await serving.serve()
        await engine.close()

    asyncio.run(run())


if __name__ == "__main__":
    main()
