"""Our side of `cold_storm`: leases of the adapter cache. The case comes as JSON on standard input, the result goes out as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import torch
from storm import Case, keep_off_the_engines_core, start_engine, storm, tokens

from serving.adapters.admission import Requirements
from serving.adapters.cache import AdapterCache, CacheLimits
from serving.adapters.loader import LoaderSettings
from serving.adapters.process import LoaderProcess


async def main(case: Case) -> None:
    engine, spent = start_engine(case)
    adapters = case["adapters"]
    requirements = Requirements(case["base_digest"], engine._core.network.places, torch.bfloat16)
    loader = LoaderProcess(LoaderSettings(case["store"], Path(case["disk"]), 8 << 30, requirements))
    cache = AdapterCache(loader, engine, CacheLimits(slots=len(adapters), timeout=600.0))

    async def ask(digest: str, new: int) -> AsyncIterator[float]:
        async with cache.lease(digest):
            async for now in tokens(engine, digest, new):
                yield now

    try:
        here = adapters if case["resident"] else adapters[: case["warm"]]
        await asyncio.gather(*(_touch(cache, digest) for digest in here))
        spent.clear()
        result = await storm(case, ask)
    finally:
        await cache.close()
        await loader.close()
        await engine.close()
    print(json.dumps(result | {"engine_us": spent, "cache": asdict(cache.metrics)}))


async def _touch(cache: AdapterCache, digest: str) -> None:
    async with cache.lease(digest):
        pass


if __name__ == "__main__":
    keep_off_the_engines_core()
    asyncio.run(main(json.load(sys.stdin)))
