"""An engine's replicas as the gateway sees them: one `BaseEngine` over a Serve handle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from orchestrator.errors import AdaptoryError, EngineOverloaded, EngineStopped, ReplicaUnavailable
from serving.engine.protocol import GenerateRequest, TokenEvent
from serving.gateway.ports import Running
from serving.mail import Postbox
from serving.wire import Begun

log = logging.getLogger(__name__)

_DIRECTLY = {"_by_reference": False, "request_serialization": "pickle", "response_serialization": "pickle"}
"""Through gRPC from process to process: Ray's calls of actors and its streams of objects take twice as long."""

_TRIES = 3
_GONE = (RayActorError, DeploymentUnavailableError, RequestCancelledError, TaskCancelledError, AioRpcError)
"""What a replica's end looks like from here; nothing of it is the request's fault."""


class HandleEngine:
    """
    Args:
        handle: of a deployment of `EngineReplica`s.
        patience: seconds until the first event must be there.
        postbox: where replicas on this machine send their items.
        replicas: names of those that are known now.
    """

    def __init__(
        self,
        handle: Any,
        patience: float = 300.0,
        postbox: Postbox | None = None,
        replicas: Callable[[], Collection[str]] = frozenset,
    ):
        self._answer = handle.options(stream=True, **_DIRECTLY).answer
        self._patience, self._postbox, self._replicas = patience, postbox, replicas

    async def begin(self, request: GenerateRequest, *, stream: bool) -> Running:
        for tries_left in reversed(range(_TRIES)):
            # a replica that was out of reach only may be asked again while it still answers: each try has its own id
            items = self._ask(replace(request, id=f"{request.id}-{tries_left}"), stream)
            try:
                async with asyncio.timeout(self._patience):
                    first = await anext(items)
            except TimeoutError as error:
                items.cancel()
                raise ReplicaUnavailable(
                    f"No replica began to answer within {self._patience:g} s.", hint="Ask again."
                ) from error
            except BackPressureError as error:
                raise EngineOverloaded("All replicas are full.", hint="Ask again later.", everywhere=True) from error
            except (*_GONE, StopAsyncIteration) as error:
                log.warning("%s: a replica is gone before it answered: %s", request.id, error)
                if not tries_left:
                    raise _gone() from error
                continue
            except BaseException:  # the client went away
                items.cancel()
                raise
            if isinstance(first, EngineStopped) and tries_left:
                log.warning("%s: a replica has stopped: %s", request.id, first)
                continue
            if isinstance(first, EngineOverloaded):
                request = self._elsewhere(request, first, tries_left)
                continue
            if isinstance(first, AdaptoryError):
                raise first
            assert isinstance(first, Begun)
            answer = _Answer(first.event, items)
            return Running(first.replica, answer.events(), answer.close)
        raise AssertionError("unreachable")

    def _elsewhere(self, request: GenerateRequest, refused: EngineOverloaded, tries_left: int) -> GenerateRequest:
        """The request for another replica: what this process knows of their queues is a moment old, and one may have room.

        Raises:
            EngineOverloaded: there is none, or enough were asked.
        """
        replica = refused.context.get("replica", "")  # one of an older version, in the middle of a deploy, does not say
        refused_by = request.refused_by | {replica}
        others = set(self._replicas()) - refused_by
        if not others:
            refused.context["everywhere"] = True
        if not (tries_left and others) or replica in request.refused_by:
            raise refused
        return replace(request, refused_by=refused_by)

    def _ask(self, request: GenerateRequest, stream: bool) -> Any:
        if self._postbox is None or not stream:
            return self._answer.remote(request, stream)
        return self._postbox.ask(self._answer, request, stream)


class _Answer:
    """What is left of an answer's items."""

    def __init__(self, first: TokenEvent, items: Any):
        self._first, self._items = first, items
        self._ended = first.finish is not None

    async def events(self) -> AsyncIterator[TokenEvent]:
        yield self._first
        try:
            while not self._ended:
                item = await anext(self._items)
                if isinstance(item, AdaptoryError):
                    raise item
                self._ended = item.finish is not None
                yield item
        except (*_GONE, StopAsyncIteration) as error:
            raise _gone() from error

    async def close(self) -> None:
        """Has the replica abort it; one that is complete costs no call."""
        if not self._ended:
            self._items.cancel()


def _gone() -> ReplicaUnavailable:
    return ReplicaUnavailable("The replica that answered is gone.", hint="Ask again.")
