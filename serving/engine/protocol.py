"""What every engine promises: requests and events that cross threads and processes, and the `Engine` itself. No torch."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from orchestrator.errors import InvalidRequest
from serving.engine.fairness import surplus

if TYPE_CHECKING:
    from serving.engine.prepared import Prepared


@dataclass(frozen=True)
class JsonObject:
    """The answer is one JSON object."""

    type: Literal["json_object"] = "json_object"


@dataclass(frozen=True)
class JsonSchema:
    """The answer is JSON that this schema allows."""

    schema: str
    """JSON text."""
    type: Literal["json_schema"] = "json_schema"


ResponseFormat = JsonObject | JsonSchema


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when an answer ends.

    Raises:
        InvalidRequest: a value out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities reach this sum (arXiv:1904.09751)."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: all."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else is in the batch; None: one is drawn."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    ignore_end: bool = False
    """Go on past the model's end of turn until `max_tokens`: for benchmarks."""
    response_format: ResponseFormat | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "from 0 to 2")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        _require(len(self.stop) <= 16 and all(self.stop), "stop", list(self.stop), "at most 16 texts, none empty")
        if isinstance(self.response_format, JsonSchema):
            try:
                valid = isinstance(json.loads(self.response_format.schema), dict | bool)
            except ValueError:
                valid = False
            _require(valid, "response_format.schema", self.response_format.schema[:200], "a JSON schema")


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise InvalidRequest(f"{name} is {value!r}; it must be {expected}.", field=name, value=value)


@dataclass(frozen=True)
class GenerateRequest:
    prompt_ids: tuple[int, ...]
    adapter: str | None = None
    """Digest of an adapter that is loaded; None: the base alone."""
    sampling: Sampling = Sampling()
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    tenant: str = ""
    """Who asks: tenants share an engine by tokens."""
    fetched: bool = False
    """Its adapter was loaded for it, which is not to be for nothing: it gives way to none of its tenant's, and the youngest of them to it."""
    refused_by: frozenset[str] = frozenset()
    """Replicas that have just turned it away."""


class FinishReason(StrEnum):
    STOP = "stop"
    """The model ended its turn, or a stop text came up."""
    LENGTH = "length"
    """`max_tokens`, or the longest sequence that the engine holds."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt: int
    cached: int
    """Of the prompt's: taken from another request's cache."""
    completion: int


@dataclass(frozen=True)
class TokenEvent:
    """What one step adds to one answer."""

    tokens: tuple[int, ...]
    """New tokens, the end of turn excluded."""
    text: str
    """New text. Held back while it could still turn out as part of a stop text or of an unfinished character, so it may
    lag behind the tokens; the texts of all events together are the answer."""
    finish: FinishReason | None = None
    """Set on the last event."""
    usage: Usage | None = None
    """Set on the last event."""


@dataclass(frozen=True)
class EngineStats:
    running: int
    waiting: int
    adapters: tuple[str, ...]
    """Digests in slots."""
    cache_tokens: int
    """Capacity of the key-value cache."""
    cache_tokens_used: int
    """Held by running requests; what is kept for sharing can be taken back at any time and does not count."""
    prompt_tokens: int
    """Ever computed or shared."""
    shared_tokens: int
    """Of those: not computed, since another request's cache had them."""
    completion_tokens: int
    preemptions: int
    steps: int
    failed_steps: int
    step_seconds: float
    """Spent in steps so far."""
    waiting_tokens: int = 0
    """Of prompts: still to be read before what was asked can be answered."""
    cache_bytes: int = 0
    """Of the key-value cache, at its capacity."""


@dataclass(frozen=True)
class Backlog:
    """How many requests more an engine would take now."""

    room: int
    """New requests before it turns any away."""
    waiting: Mapping[str, int]
    """Of each tenant: new requests of which the youngest gives way to one of a tenant that has fewer, when there is no room."""
    impatient: frozenset[str] = frozenset()
    """Tenants of which one that waits gives way to their own next, when there is no room."""

    def takes(self, tenant: str) -> bool:
        """Whether a new request of this tenant's would not be turned away."""
        return self.room > 0 or tenant in self.impatient or surplus(self.waiting, tenant) is not None


class Engine(Protocol):
    """Answers requests over one base model, each with its own adapter or none.

    Adapters are named by digest; the caller decides which are loaded (its cache leases them while requests use them).
    """

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one answer. Closing the generator aborts the request at the next step.

        Raises:
            InvalidRequest: it could never be answered here.
            AdapterNotLoaded: its adapter is in no slot.
            EngineOverloaded: too many wait.
            StepFailed, EngineStopped: it began and cannot be ended.
        """

    async def abort(self, request_id: str) -> None:
        """End a request; its generator stops without a last event. An unknown id is ignored: it may just have ended."""

    async def load_adapter(self, digest: str, directory: Path) -> None:
        """Put an adapter's files into a slot; does nothing when it is there. Running requests go on meanwhile.

        Raises:
            AdapterError: damaged, or it does not fit the base.
            NoFreeSlot: every slot is taken.
        """

    async def unload_adapter(self, digest: str) -> None:
        """Free a slot; does nothing when it is not loaded.

        Raises:
            AdapterInUse: requests still use it.
        """

    async def swap_adapters(self, install: Mapping[str, Prepared], remove: Collection[str]) -> None:
        """Free slots and fill others, all of it or nothing; what is loaded already stays as it is.

        Raises:
            AdapterInUse: requests still use one of `remove`.
            NoFreeSlot: there would be too many.
            AdapterError: this engine cannot serve one of `install`.
        """

    def stats(self) -> EngineStats: ...

    def backlog(self) -> Backlog:
        """What a request could be told before its adapter is fetched. Whoever asks is told how it was a moment ago."""

    @property
    def alive(self) -> bool:
        """Whether it still answers."""

    async def close(self) -> None:
        """End every request with `EngineStopped`, then the engine."""
