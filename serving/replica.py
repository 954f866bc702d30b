"""A replica of an engine: one base model, the engine over it, and the cache of adapters that fills the engine's slots."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import AdaptoryError, EngineStopped, ModelError
from orchestrator.modeling.base_model import materialize
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.loading import DTYPES, load_model
from orchestrator.modeling.prompts import end_tokens, load_tokenizer
from orchestrator.store import Store
from serving.adapters.admission import Requirements
from serving.adapters.cache import AdapterCache, CacheLimits
from serving.adapters.loader import LoaderSettings
from serving.adapters.process import LoaderProcess
from serving.engine.core import EngineCore
from serving.engine.local import LocalEngine
from serving.engine.network import ServedNetwork
from serving.engine.protocol import GenerateRequest
from serving.engine.scheduler import Limits
from serving.wire import Begun, Item, joined

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How one base model is served."""

    reference: str
    """As `orchestrator.modeling.base_model.materialize` takes it."""
    digest: str
    store_url: str
    cache: Path
    """Of base models and adapters, on each node."""
    dtype: str = "bfloat16"
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


class EngineReplica:
    """
    Args:
        died: told when the engine has ended by itself, and nothing will be answered any more.

    Raises:
        ModelError: the base is not there, is another one than its digest says, or has no fused decoder.
    """

    def __init__(self, options: EngineOptions, name: str, died: Callable[[], None] | None = None):
        self.name, self._options = name, options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.core = _core(options)
        self.engine = LocalEngine(self.core, died)
        requirements = Requirements(
            options.digest, self.core.network.places, self.core.network.dtype, max_rank=options.max_rank
        )
        disk = options.cache / "adapters"
        settings = LoaderSettings(options.store_url, disk, options.disk_bytes, requirements)
        self.loader = LoaderProcess(settings, pinned=self.core.network.device.type == "cuda")
        limits = CacheLimits(slots=options.max_adapters, memory=options.memory_bytes)
        self.cache = AdapterCache(self.loader, self.engine, limits)

    async def start(self) -> None:
        """Have the loader's process ready before the first adapter is asked for."""
        await self.loader.start()

    async def answer(self, request: GenerateRequest, stream: bool) -> AsyncGenerator[Item, None]:
        """An answer's items: the first is `Begun`, or an error.

        Args:
            stream: otherwise the first item is all.
        """
        try:
            async with self._leased(request.adapter), contextlib.aclosing(self.engine.generate(request)) as events:
                if not stream:
                    yield Begun(self.name, await joined(events))
                    return
                begun = False
                async for event in events:
                    yield event if begun else Begun(self.name, event)
                    begun = True
        except AdaptoryError as error:
            yield error

    @contextlib.asynccontextmanager
    async def _leased(self, adapter: str | None) -> AsyncIterator[None]:
        if adapter is None:
            yield
        else:
            async with self.cache.lease(adapter):
                yield

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
            raise EngineStopped("The engine's thread has ended.", hint="Start the replica anew.")

    def prefetch(self, adapter: str) -> None:
        """Have it ready; the next request for it finds it here."""
        self.cache.prefetch([adapter])

    async def close(self) -> None:
        await self.cache.close()
        await asyncio.gather(self.engine.close(), self.loader.close())


def _core(options: EngineOptions) -> EngineCore:
    base = materialize(options.reference, cache=options.cache, store=Store(options.store_url))
    if base.digest != options.digest:
        raise ModelError(
            f"The base model {options.reference} is {base.digest} here, and {options.digest} where serving was started.",
            hint="Its files were changed: run `adaptory up` again.",
            model=options.reference,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(base.path, dtype=DTYPES[options.dtype], device=device)
    if not isinstance(model, Decoder):
        raise ModelError(
            f"The engine does not run {base.model_type} models yet.",
            hint="Serve it with vLLM, or choose another base model.",
            model=options.reference,
        )
    tokenizer = load_tokenizer(base.path)
    network = ServedNetwork(model.eval())
    limits = engine_limits(options, network)
    log.info("%s is loaded: %d tokens of key-value cache", options.reference, limits.cache_tokens)
    return EngineCore(network, tokenizer, end_tokens(tokenizer), limits)


def engine_limits(options: EngineOptions, network: ServedNetwork) -> Limits:
    """As much key-value cache as memory allows, and no more than all sequences at their longest could fill."""
    most = options.max_sequences * options.max_length
    room = network.cache_tokens(options.cache_share)
    return Limits(
        cache_tokens=max(min(most, room), options.max_length),
        max_sequences=options.max_sequences,
        max_length=options.max_length,
        max_adapters=options.max_adapters,
        max_waiting=8 * options.max_sequences,
    )
