"""Who answers over a base model, and who is told what that took."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from serving.engine.protocol import GenerateRequest, TokenEvent


@dataclass(frozen=True)
class Running:
    """An answer that has begun."""

    replica: str
    events: AsyncIterator[TokenEvent]
    close: Callable[[], Awaitable[None]]
    """Aborts what still runs; to be called in any case."""


class BaseEngine(Protocol):
    """Answers over one base model, wherever its replicas are."""

    async def begin(self, request: GenerateRequest, *, stream: bool) -> Running:
        """Returns when the first event is there; until then another replica can still take over.

        Args:
            stream: events as they come; otherwise one event with the whole answer.

        Raises:
            AdapterError: refused; its `check` says why.
            AdapterUnavailable, StoreError: the adapter cannot be had now.
            ReplicaUnavailable: no replica answers.
            InvalidRequest, EngineError: as `serving.engine.protocol.Engine`.
        """


class UsageSink(Protocol):
    def add(self, tenant: str, route: str, adapter: str | None, *, tokens_in: int, tokens_out: int) -> None:
        """One request that has ended, with what it used. Does not wait."""
