"""The cache's two neighbours, loads and an engine, which wait for the test: nothing happens but what it says."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import torch

from orchestrator.errors import AdapterError, AdapterInUse
from serving.adapters.cache import AdapterCache, CacheLimits
from serving.adapters.process import Loaded
from serving.engine.prepared import Prepared


def name(number: int) -> str:
    return f"sha256:{number:064x}"


class Loads:
    """Each load waits until the test ends it; a second one of the same adapter is a failure."""

    def __init__(self, limit: int = 4, sizes: dict[str, int] | None = None):
        self.going: dict[str, asyncio.Future] = {}
        self.asked: Counter[str] = Counter()
        self.limit, self.sizes = limit, sizes or {}

    async def load(self, digest):
        assert digest not in self.going, "single flight"
        assert len(self.going) < self.limit
        self.asked[digest] += 1
        self.going[digest] = asyncio.get_running_loop().create_future()
        try:
            return await self.going[digest]
        finally:
            del self.going[digest]

    def end(self, digest, error=None):
        if error is not None:
            self.going[digest].set_exception(error)
        else:
            numbers = self.sizes.get(digest, 100) // 4
            self.going[digest].set_result(Loaded(Prepared((), torch.zeros(numbers)), from_store=True))


class Engine:
    """Its slots. While `held`, swaps wait as they do for a long step; who is in `lingering` cannot leave, and
    who is in `unfit` cannot be served."""

    def __init__(self, slots: int):
        self.slots, self.present, self.lingering = slots, set(), set()
        self.held: asyncio.Event | None = None
        self.unfit: set[str] = set()
        self.swapping = 0
        self.leased: Counter[str] = Counter()

    async def swap_adapters(self, install, remove):
        assert not self.swapping
        self.swapping += 1
        try:
            if self.held is not None:
                await self.held.wait()
            if self.lingering & set(remove):
                raise AdapterInUse("still answering")
            if unfit := self.unfit & set(install):
                raise AdapterError("does not fit", adapter=min(unfit), check="names")
            assert set(remove) <= self.present
            assert not {digest for digest in remove if self.leased[digest]}, "nothing in use leaves"
            assert not set(install) & self.present, "installed once"
            self.present = (self.present - set(remove)) | set(install)
            assert len(self.present) <= self.slots
        finally:
            self.swapping -= 1


async def quiet(turns: int = 30) -> None:
    """Let everything happen that can."""
    for _ in range(turns):
        await asyncio.sleep(0)


def running(test):
    """Run a test's coroutine with (cache, loads, engine), and close the cache."""

    def run(slots=2, memory=1000, sizes=None, clock=time.monotonic, **limits):
        async def main():
            loads, engine = Loads(sizes=sizes), Engine(slots)
            cache = AdapterCache(loads, engine, CacheLimits(slots=slots, memory=memory, **limits), clock)
            try:
                await test(cache, loads, engine)
            finally:
                await cache.close()

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


class Lease:
    """A lease in a task of its own."""

    def __init__(self, cache, number, timeout=None):
        self.digest, self._release = name(number), asyncio.Event()
        self.has = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._hold(cache, timeout))

    async def _hold(self, cache, timeout):
        try:
            async with cache.lease(self.digest, timeout):
                self.has.set_result(None)
                await self._release.wait()
        except BaseException as error:
            if not self.has.done():
                self.has.set_exception(error)
                self.has.exception()

    async def end(self):
        self._release.set()
        await self.task
