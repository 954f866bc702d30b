"""The whole way, real at every station: store, disk, the loader's process, memory, the engine and its answers. About 30 seconds."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from orchestrator.errors import AdapterError
from orchestrator.modeling.loading import load_model
from orchestrator.store import adapter_path
from serving.adapters.cache import AdapterCache, CacheLimits
from serving.adapters.process import LoaderProcess
from serving.engine.core import EngineCore
from serving.engine.local import LocalEngine
from serving.engine.network import ServedNetwork
from serving.engine.protocol import GenerateRequest, Sampling
from serving.engine.scheduler import Limits


@pytest.fixture
def core(tiny_model):
    """`core(slots=…)` → an engine's core over a network of its own, since adapters stay in a network."""

    def make(slots=4):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
        served = ServedNetwork(load_model(tiny_model("llama"), dtype=torch.float32).eval())
        return EngineCore(
            served,
            tokenizer,
            frozenset(),
            Limits(cache_tokens=16_384, max_sequences=32, batch_tokens=64, max_adapters=slots),
        )

    return make


def living(core, settings, use, **limits):
    async def main():
        engine, loader = LocalEngine(core), LoaderProcess(settings)
        cache = AdapterCache(loader, engine, CacheLimits(slots=core.limits.max_adapters, **limits))
        try:
            return await use(cache, engine)
        finally:
            await cache.close()
            await loader.close()
            await engine.close()

    return asyncio.run(asyncio.wait_for(main(), timeout=240))


async def answer(cache, engine, digest, new=6, timeout=120):
    async with cache.lease(digest, timeout):
        request = GenerateRequest((5, 6, 7), digest, Sampling(max_tokens=new, ignore_end=True))
        return [token async for event in engine.generate(request) for token in event.tokens]


def test_two_hundred_cold_adapters_over_four_slots_while_a_warm_one_answers(core, settings, write, publish):
    """Each is answered by its own weights, whatever left and came meanwhile; the warm one is never without a slot."""
    digests = [publish(write(seed, rank=1 + seed % 8)) for seed in range(200)]

    async def use(cache, engine):
        warm = digests[0]
        alone = await answer(cache, engine, warm, new=400)
        async with cache.lease(warm):
            steady = asyncio.create_task(answer(cache, engine, warm, new=400))
            answers = await asyncio.gather(*(answer(cache, engine, digest) for digest in digests))
            assert warm in cache.residency.engine
            assert await steady == alone
        assert len(cache.residency.engine) <= 4
        assert set(engine.stats().adapters) == cache.residency.engine
        assert cache.metrics.memory_bytes <= cache.limits.memory
        assert cache.metrics.loads_from_store >= 200
        assert cache.metrics.memory_evictions > 0
        again = [await answer(cache, engine, digest) for digest in digests[:5]]
        return answers, again

    answers, again = living(core(), settings, use, memory=400_000)
    assert again == answers[:5]
    assert len({tuple(tokens) for tokens in answers}) > 100, "adapters differ, so answers do"


def test_a_bad_one_among_good_ones_is_its_callers_alone(core, settings, write, publish, store):
    good, bad = [publish(write(seed)) for seed in (1, 2)], publish(write(3, rank=17))

    async def use(cache, engine):
        results = await asyncio.gather(
            *(answer(cache, engine, digest) for digest in (good[0], bad, bad, good[1])), return_exceptions=True
        )
        assert [isinstance(result, AdapterError) for result in results] == [False, True, True, False]
        store.delete(adapter_path(good[0]))
        assert await answer(cache, engine, good[0]) == results[0]

    living(core(), settings, use)


def test_a_client_that_goes_away_gives_its_adapter_back(core, settings, write, publish):
    first, second = (publish(write(seed)) for seed in (1, 2))

    async def use(cache, engine):
        client = asyncio.create_task(answer(cache, engine, first, new=8000))
        while engine.stats().running == 0:
            assert not client.done()
            await asyncio.sleep(0.01)
        client.cancel()
        assert len(await answer(cache, engine, second)) == 6
        assert engine.stats().adapters == (second,)

    living(core(slots=1), settings, use)


def test_bf16_engines_get_bf16(settings, write, publish):
    settings = replace(settings, requirements=replace(settings.requirements, dtype=torch.bfloat16))
    digest = publish(write())

    async def main():
        loader = LoaderProcess(settings)
        try:
            return await loader.load(digest)
        finally:
            await loader.close()

    assert asyncio.run(main()).prepared.buffer.dtype == torch.bfloat16
