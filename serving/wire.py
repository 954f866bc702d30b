"""What travels between a gateway and an engine's replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from orchestrator.errors import AdaptoryError
from serving.engine.protocol import TokenEvent


@dataclass(frozen=True)
class Begun:
    """The first of an answer's items."""

    replica: str
    event: TokenEvent


Item = Begun | TokenEvent | AdaptoryError
"""An error is the last of an answer's items: one that is raised would come wrapped, and be logged as a defect."""


async def joined(events: AsyncIterator[TokenEvent]) -> TokenEvent:
    """A whole answer as one event."""
    texts: list[str] = []
    tokens: list[int] = []
    async for event in events:
        texts.append(event.text)
        tokens += event.tokens
        if event.finish is not None:
            return TokenEvent(tuple(tokens), "".join(texts), event.finish, event.usage)
    raise AssertionError("an answer ends with its last event, with an error, or is not waited for")
