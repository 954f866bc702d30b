"""What both sides of `cold_storm` share: the engine on a core of its own, and the storm itself."""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.loading import load_model
from serving.engine.core import EngineCore
from serving.engine.local import LocalEngine
from serving.engine.network import ServedNetwork
from serving.engine.protocol import GenerateRequest, Sampling
from serving.engine.scheduler import Limits

PROMPT = tuple(range(100, 132))

Ask = Callable[[str, int], AsyncIterator[float]]
"""(digest, new tokens) → the time of each token."""

Case = dict[str, Any]


def keep_off_the_engines_core() -> None:
    """This process, and whatever it starts, runs on the last core; `start_engine` moves its thread to the first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def start_engine(case: Case) -> tuple[LocalEngine, list[float]]:
    """The engine, and a list that gets the microseconds of its thread for each adapter that is installed."""
    torch.set_num_threads(1)
    model = Path(case["model"])
    adapters = len(case["adapters"])
    limits = Limits(cache_tokens=64 * 1024, max_sequences=64, max_adapters=adapters, share_prefixes=False)
    network = load_model(model)
    assert isinstance(network, Decoder)
    core = EngineCore(ServedNetwork(network.eval()), AutoTokenizer.from_pretrained(model), frozenset(), limits)
    spent: list[float] = []
    _watch(core, "swap", spent)
    _watch(core, "install", spent)
    engine = LocalEngine(core)
    thread = next(t for t in threading.enumerate() if t.name == "engine")
    assert thread.native_id is not None
    os.sched_setaffinity(thread.native_id, {case["engine_core"]})
    return engine, spent


def _watch(core: EngineCore, name: str, spent: list[float]) -> None:
    call = getattr(core, name)

    def watched(first: Any, *rest: Any) -> None:
        start = time.perf_counter()
        call(first, *rest)
        adapters = len(first) if isinstance(first, dict) else 1
        spent.extend([(time.perf_counter() - start) * 1e6 / max(adapters, 1)] * adapters)

    setattr(core, name, watched)


async def tokens(engine: LocalEngine, digest: str, new: int) -> AsyncIterator[float]:
    request = GenerateRequest(PROMPT, digest, Sampling(max_tokens=new, ignore_end=True))
    async for _ in engine.generate(request):
        yield time.perf_counter()


async def storm(case: Case, ask: Ask) -> dict[str, float]:
    """The warm tenants' times between tokens from the first question with a cold adapter to the last answer."""
    warm, cold = case["adapters"][: case["warm"]], case["adapters"][case["warm"] :]
    gaps: list[tuple[float, float]] = []
    started = [asyncio.Event() for _ in warm]
    streams = [asyncio.create_task(_stream(ask, digest, gaps, s)) for digest, s in zip(warm, started, strict=True)]
    await asyncio.gather(*(event.wait() for event in started))
    begin = time.perf_counter()
    await asyncio.gather(
        *(_question(ask, digest, case, n * case["spread"] / len(cold)) for n, digest in enumerate(cold))
    )
    end = time.perf_counter()
    for stream in streams:
        if stream.done():
            stream.result()
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    inside = [gap * 1e3 for at, gap in gaps if begin <= at <= end]
    return {
        "p99_ms": statistics.quantiles(inside, n=100, method="inclusive")[98],
        "p50_ms": statistics.median(inside),
        "gaps": len(inside),
        "seconds": end - begin,
    }


async def _stream(ask: Ask, digest: str, gaps: list[tuple[float, float]], started: asyncio.Event) -> None:
    """One answer after the other, for ever; the time to an answer's first token does not count."""
    while True:
        last: float | None = None
        async for now in ask(digest, 512):
            if last is not None:
                gaps.append((now, now - last))
                if len(gaps) > 100:
                    started.set()
            last = now


async def _question(ask: Ask, digest: str, case: Case, after: float) -> None:
    await asyncio.sleep(after)
    count = 0
    async for _ in ask(digest, case["new_tokens"]):
        count += 1
    assert count == case["new_tokens"]
