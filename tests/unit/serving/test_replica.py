"""A replica whose engine is full, over a tiny random model. About five seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import AdapterUnavailable, EngineOverloaded, ModelError
from serving.engine.protocol import GenerateRequest, Sampling
from serving.replica import EngineReplica
from serving.wire import Begun
from tests.gateway_process import replica

COLD = f"sha256:{'c' * 64}"


class Loads:
    """Has nothing, and remembers who was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def load(self, digest: str) -> Any:
        self.asked.append(digest)
        raise AdapterUnavailable("not here", adapter=digest)


@pytest.fixture
def full(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[EngineReplica, Loads]:
    """Two places; one request may wait, for as long as the test takes."""
    monkeypatch.setattr("serving.engine.fairness.PATIENCE", 1000.0)
    made = replica(tiny_model("llama"), tmp_path, max_sequences=2, max_length=8192)
    made.cache._loads = loads = Loads()
    return made, loads


def asks(tenant: str = "a", adapter: str | None = None, new: int = 400) -> GenerateRequest:
    return GenerateRequest((5, 6, 7), adapter, Sampling(max_tokens=new, ignore_end=True), tenant=tenant)


async def first(engine: EngineReplica, request: GenerateRequest) -> Any:
    items = engine.answer(request, stream=True)
    try:
        return await anext(items)
    finally:
        await items.aclose()


def test_a_full_engine_turns_away_before_an_adapter_is_fetched(full: tuple[EngineReplica, Loads]):
    engine, loads = full

    async def run() -> None:
        assert isinstance(await first(engine, asks(adapter=COLD)), AdapterUnavailable)
        assert loads.asked == [COLD]
        running = [engine.answer(asks(new=8000), stream=True) for _ in range(2)]
        for items in running:
            assert isinstance(await anext(items), Begun)
        waiting = asyncio.create_task(first(engine, asks()))
        while engine.engine.stats().waiting < 1:
            await asyncio.sleep(0.001)
        for adapter in (None, COLD.replace("c", "d")):
            refused = await first(engine, asks(adapter=adapter))
            assert isinstance(refused, EngineOverloaded)
            assert refused.context["replica"] == engine.name
        assert loads.asked == [COLD]
        for items in running:
            await items.aclose()
        assert isinstance(await waiting, Begun)
        await engine.close()

    asyncio.run(run())


def test_whose_adapter_was_fetched_is_told_to_the_engine(
    full: tuple[EngineReplica, Loads], monkeypatch: pytest.MonkeyPatch
):
    engine, told = full[0], []

    async def generate(request: GenerateRequest) -> Any:
        told.append(request)
        raise EngineOverloaded("full")
        yield

    monkeypatch.setattr(engine.engine, "generate", generate)
    monkeypatch.setattr(engine.cache, "lease", lambda adapter: contextlib.nullcontext())

    async def run() -> None:
        for adapter in (None, COLD):
            assert isinstance(await first(engine, asks(adapter=adapter)), EngineOverloaded)
        await engine.engine.close()

    asyncio.run(run())
    assert [request.fetched for request in told] == [False, True]


def test_a_length_that_no_memory_holds_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path):
    with pytest.raises(ModelError, match=r"may have 1,000,000,000,000 tokens") as caught:
        replica(tiny_model("llama"), tmp_path, max_length=10**12)
    assert "--max-length" in (caught.value.hint or "")
