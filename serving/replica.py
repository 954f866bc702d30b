"""A replica of an engine: one base model, the engine over it, and the cache of adapters that fills the engine's slots."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from orchestrator.errors import AdaptoryError, EngineOverloaded, EngineStopped, ModelError
from orchestrator.modeling.base_model import BaseModel, materialize
from orchestrator.modeling.dtypes import DTYPES, chosen_dtype
from orchestrator.registry.signing import Trust
from orchestrator.store import Store
from serving.adapters.admission import Requirements
from serving.adapters.cache import AdapterCache, CacheLimits
from serving.adapters.loader import LoaderSettings
from serving.adapters.process import LoaderProcess
from serving.arrivals import Arrivals
from serving.engine.choice import EngineChoice, OwnEngine, VllmChoice
from serving.engine.prepared import Place
from serving.engine.protocol import Engine, GenerateRequest
from serving.places import Places
from serving.wire import Begun, Item, joined

if TYPE_CHECKING:
    from serving.engine.network import ServedNetwork
    from serving.engine.scheduler import Limits

log = logging.getLogger(__name__)


PLACES_A_WAITER = 8
"""An eighth as many requests as there are places wait for one: enough to keep the batch full, and what is let in takes little
longer than in a full batch. The others are told to come again, rather than promised what would take ever longer."""


STEP_SECONDS = 0.5
"""That one's long prompt may hold up everybody's next token."""


@dataclass(frozen=True)
class EngineOptions:
    """How one base model is served."""

    reference: str
    """As `orchestrator.modeling.base_model.materialize` takes it."""
    digest: str
    store_url: str
    cache: Path
    """Of base models and adapters, on each node."""
    trust: Trust
    """Whose signatures count; what nobody of them has signed is not served."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_length: int = 4096
    """Tokens of prompt and answer together."""
    max_sequences: int = 32
    """Answered at the same time."""
    max_adapters: int = 64
    """In the engine at the same time."""
    max_rank: int = 128
    cache_share: float = 0.25
    """Of the memory that is free, for the key-value cache at most."""
    disk_bytes: int = 10 << 30
    """Of adapters, on each node."""
    memory_bytes: int = 2 << 30
    """Of adapters, in each replica."""
    threads: int | None = None
    """Of torch; None: its own choice, all cores."""
    engine: EngineChoice = field(default_factory=OwnEngine)

    @property
    def max_requests(self) -> int:
        """On a replica at the same time, those that wait for an adapter included. Who holds them is decided here, tenant by
        tenant: what waits before it reaches a replica waits in order of arrival, behind any flood."""
        return 16 * self.max_sequences


class EngineReplica:
    """
    Args:
        died: told when the engine has ended by itself, and nothing will be answered any more.

    Raises:
        ModelError: the base is not there, is another one than its digest says, or cannot be served by this engine.
    """

    def __init__(self, options: EngineOptions, name: str, died: Callable[[], None] | None = None):
        self.name, self._options = name, options
        base, choice = _base(options), options.engine
        built = _vllm(options, base, choice, died) if isinstance(choice, VllmChoice) else _own(options, base, died)
        self.engine = built.engine
        requirements = Requirements(
            options.digest, built.places, built.dtype, max_rank=built.max_rank, signature=options.trust.verify
        )
        disk = options.cache / "adapters"
        settings = LoaderSettings(options.store_url, disk, options.disk_bytes, requirements)
        self.loader = LoaderProcess(settings, pinned=built.pinned)
        limits = CacheLimits(slots=options.max_adapters, memory=options.memory_bytes)
        self.cache = AdapterCache(self.loader, self.engine, limits)
        self._places, self._arrivals = Places(options.max_requests), Arrivals(self.engine.backlog)

    async def start(self) -> None:
        """Have the loader's process ready before the first adapter is asked for."""
        await self.loader.start()

    async def answer(self, request: GenerateRequest, stream: bool) -> AsyncGenerator[Item, None]:
        """An answer's items: the first is `Begun`, or an error.

        Args:
            stream: otherwise the first item is all.
        """
        try:
            with self._places.held(request.tenant):
                async with (
                    self._leased(request) as ready,
                    contextlib.aclosing(self.engine.generate(ready)) as events,
                ):
                    if not stream:
                        yield Begun(self.name, await joined(events))
                        return
                    begun = False
                    async for event in events:
                        yield event if begun else Begun(self.name, event)
                        begun = True
        except AdaptoryError as error:
            if isinstance(error, EngineOverloaded):
                error.context["replica"] = self.name
            yield error

    @contextlib.asynccontextmanager
    async def _leased(self, request: GenerateRequest) -> AsyncIterator[GenerateRequest]:
        adapter = request.adapter
        arrival: contextlib.AbstractAsyncContextManager[None] = contextlib.nullcontext()
        if adapter is None or adapter in self.cache.residency.engine:
            self._arrivals.check(request.tenant)
        else:
            arrival, request = self._arrivals.held(request.tenant), replace(request, fetched=True)
        async with contextlib.AsyncExitStack() as held:
            if adapter is not None:
                async with arrival:
                    await held.enter_async_context(self.cache.lease(adapter))
            yield request

    def residency(self) -> dict[str, Any]:
        """What routers and metrics are told: JSON-able."""
        resident, stats = self.cache.residency, asdict(self.engine.stats())
        del stats["adapters"]
        return {
            "life": resident.life,
            "version": resident.version,
            "engine": sorted(resident.engine),
            "memory": sorted(resident.memory),
            "stats": stats,
            "cache": asdict(self.cache.metrics),
        }

    def check(self) -> None:
        """
        Raises:
            EngineStopped: it answers nothing any more.
        """
        if not self.engine.alive:
            raise EngineStopped("The engine has ended.", hint="Start the replica anew.")

    def prefetch(self, adapter: str) -> None:
        """Have it ready; the next request for it finds it here."""
        self.cache.prefetch([adapter])

    async def close(self) -> None:
        await self.cache.close()
        await asyncio.gather(self.engine.close(), self.loader.close())


@dataclass(frozen=True)
class _Built:
    """An engine, and what an adapter must be to go into it."""

    engine: Engine
    places: Mapping[str, Place]
    dtype: torch.dtype
    max_rank: int
    pinned: bool
    """Whether adapters go from here to a GPU."""


def _base(options: EngineOptions) -> BaseModel:
    base = materialize(options.reference, cache=options.cache, store=Store(options.store_url))
    if base.digest != options.digest:
        raise ModelError(
            f"The base model {options.reference} is {base.digest} here, and {options.digest} where serving was started.",
            hint="Its files were changed: run `adaptory up` again.",
            model=options.reference,
        )
    return base


def _own(options: EngineOptions, base: BaseModel, died: Callable[[], None] | None) -> _Built:
    # imported here: vLLM's environment has another transformers, and needs none of it
    from orchestrator.modeling.decoder import Decoder
    from orchestrator.modeling.loading import load_model
    from orchestrator.modeling.prompts import end_tokens, load_tokenizer
    from serving.engine.core import EngineCore
    from serving.engine.local import LocalEngine
    from serving.engine.network import ServedNetwork

    # One pool of threads, the engine's: if this thread had one as well, there would be more threads than cores, and OpenMP
    # would put them to sleep between any two operations. That halves the speed.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(base.path, dtype=DTYPES[chosen_dtype(options.dtype, device)], device=device)
    if not isinstance(model, Decoder):
        raise ModelError(
            f"The engine does not run {base.model_type} models yet.",
            hint="Serve it with vLLM (`adaptory up --engine vllm`), or choose another base model.",
            model=options.reference,
        )
    tokenizer = load_tokenizer(base.path)
    network = ServedNetwork(model.eval())
    limits = engine_limits(options, network)
    log.info("%s is loaded: %d tokens of key-value cache", options.reference, limits.cache_tokens)
    engine = LocalEngine(EngineCore(network, tokenizer, end_tokens(tokenizer), limits), options.threads, died)
    return _Built(engine, network.places, network.dtype, options.max_rank, pinned=device == "cuda")


def _vllm(options: EngineOptions, base: BaseModel, choice: VllmChoice, died: Callable[[], None] | None) -> _Built:
    from orchestrator.modeling.adapter_check import base_modules

    places = {name: Place(name, 0, *shape) for name, shape in base_modules(base.path).items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, max_rank = DTYPES[chosen_dtype(options.dtype, device)], min(options.max_rank, choice.max_rank)
    try:
        from serving.engine.vllm import VllmEngine, VllmLimits

        limits = VllmLimits(
            max_sequences=options.max_sequences,
            max_length=options.max_length,
            max_waiting=max(1, options.max_sequences // PLACES_A_WAITER),
            max_adapters=options.max_adapters,
            batch_adapters=choice.batch_adapters,
            max_rank=max_rank,
            cache_share=options.cache_share,
            eager=choice.eager,
        )
        engine = VllmEngine(base.path, places, dtype, limits, died)
    except Exception as error:  # one of vLLM's own could not be unpickled where it is read
        raise ModelError(
            f"vLLM cannot serve {options.reference}: {type(error).__name__}: {str(error)[:500]}",
            hint=f"The replica's log says more; {choice.python} needs vllm and serving/engine/vllm-requirements.txt.",
            model=options.reference,
        ) from None
    # its workers read adapters from files
    return _Built(engine, places, dtype, max_rank, pinned=False)


def engine_limits(options: EngineOptions, network: ServedNetwork) -> Limits:
    """As much key-value cache as memory allows, and no more than all sequences at their longest could fill.

    Raises:
        ModelError: not even one sequence at its longest fits into the memory that is free.
    """
    from serving.engine.scheduler import Limits

    if (fit := network.cache_tokens(1.0)) < options.max_length:
        raise ModelError(
            f"A request may have {options.max_length:,} tokens, and the memory that is free holds {fit:,}.",
            hint="Lower `adaptory up --max-length`, or free memory.",
            model=options.reference,
            max_length=options.max_length,
        )
    most = options.max_sequences * options.max_length
    room = network.cache_tokens(options.cache_share)
    return Limits(
        cache_tokens=max(min(most, room), options.max_length),
        max_sequences=options.max_sequences,
        max_length=options.max_length,
        max_adapters=options.max_adapters,
        max_waiting=max(1, options.max_sequences // PLACES_A_WAITER),
        step_seconds=STEP_SECONDS,
    )
