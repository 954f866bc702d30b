"""An engine's replica as Ray Serve runs it. Apart from `serving.app`, since vLLM's environment has none of what a gateway imports."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from ray import serve

from serving import autoscaler
from serving.engine.protocol import GenerateRequest
from serving.mail import Couriers, ReplyTo
from serving.replica import EngineOptions, EngineReplica
from serving.wire import Item


class ServedEngine:
    """A replica of an engine, as Serve calls it."""

    async def __init__(self, options: EngineOptions):  # type: ignore[misc]  # Serve awaits it
        self._replica = EngineReplica(options, serve.get_replica_context().replica_id.unique_id, _leave)
        self._couriers = Couriers()
        await self._replica.start()

    async def answer(
        self, request: GenerateRequest, stream: bool, reply_to: ReplyTo | None = None
    ) -> AsyncGenerator[Item, None]:
        async with contextlib.aclosing(self._replica.answer(request, stream)) as items:
            async for item in self._couriers.deliver(items, reply_to):
                yield item

    async def prefetch(self, adapter: str) -> None:
        self._replica.prefetch(adapter)

    def record_routing_stats(self) -> dict[str, Any]:
        return self._replica.residency()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return autoscaler.told(asdict(self._replica.engine.stats()))

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
