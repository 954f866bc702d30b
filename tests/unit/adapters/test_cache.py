"""The cache's promises, with loads and an engine that wait for the test. Nothing here takes time but hypothesis: 15 seconds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.errors import (
    AdapterCacheFull,
    AdapterError,
    AdapterInUse,
    AdapterLoadTimeout,
    AdapterUnavailable,
    EngineStopped,
    StoreError,
)
from serving.adapters.cache import AdapterCache, CacheLimits
from serving.adapters.eviction import Worth
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


def test_one_load_however_many_ask_and_one_who_leaves_leaves_it_to_the_others():
    @running
    async def test(cache, loads, engine):
        leases = [Lease(cache, 1) for _ in range(50)]
        await quiet()
        leases[0].task.cancel()
        await quiet()
        loads.end(name(1))
        await quiet()
        assert loads.asked == {name(1): 1}
        assert all(lease.has.done() and lease.has.exception() is None for lease in leases[1:])
        assert cache.metrics.cold == 49
        assert engine.present == {name(1)} == set(cache.residency.engine)

    test()


def test_a_cold_adapter_takes_nothing_from_a_warm_one():
    """200 cold ones are asked for, over a full engine; leases of what is there go on at once, and it stays."""

    @running
    async def test(cache, loads, engine):
        warm = [Lease(cache, number) for number in (1, 2)]
        await quiet()
        for lease in warm:
            loads.end(lease.digest)
            await lease.has
        cold = [Lease(cache, 100 + n) for n in range(200)]
        await quiet()
        assert len(loads.going) == 4
        while loads.going:
            loads.end(next(iter(loads.going)))
            await quiet()
            async with asyncio.timeout(10), cache.lease(name(1)), cache.lease(name(2)):
                assert {name(1), name(2)} <= engine.present
        assert not any(lease.has.done() for lease in cold), "both slots are leased"
        assert cache.metrics.memory_bytes <= 1000

    test()


def test_an_adapter_that_the_engine_cannot_serve_is_refused_and_costs_the_others_nothing():
    @running
    async def test(cache, loads, engine):
        engine.unfit = {name(3)}
        there = [Lease(cache, number) for number in (1, 2)]
        await quiet()
        for lease in there:
            loads.end(lease.digest)
            await lease.has
            await lease.end()
        unfit, good = Lease(cache, 3), Lease(cache, 4)
        await quiet()
        loads.end(name(3))
        loads.end(name(4))
        with pytest.raises(AdapterError) as caught:
            await unfit.has
        assert caught.value.context["check"] == "names"
        await good.has
        assert name(4) in engine.present == cache.residency.engine
        assert name(3) not in cache.residency.memory
        assert cache.metrics.memory_bytes == 300
        with pytest.raises(AdapterError):
            await Lease(cache, 3).has
        assert (cache.metrics.refused_loads, cache.metrics.remembered_refusals) == (1, 1)
        assert loads.asked[name(3)] == 1

    test()


def test_the_load_comes_before_the_eviction_and_a_failed_one_evicts_nothing():
    @running
    async def test(cache, loads, engine):
        for number in (1, 2):
            lease = Lease(cache, number)
            await quiet()
            loads.end(lease.digest)
            await lease.has
            await lease.end()
        version = cache.residency.version
        refused = Lease(cache, 3)
        await quiet()
        loads.end(name(3), AdapterError("bad", adapter=name(3), check="finite"))
        with pytest.raises(AdapterError, match="bad"):
            await refused.has
        assert engine.present == {name(1), name(2)}
        assert cache.residency.version == version
        good = Lease(cache, 4)
        await quiet()
        assert engine.present == {name(1), name(2)}, "nothing leaves for what is not here"
        loads.end(name(4))
        await good.has
        assert engine.present == {name(2), name(4)}

    test()


def test_a_refusal_is_remembered_for_a_while_and_a_store_that_is_gone_for_less():
    now = 0.0

    @running
    async def test(cache, loads, engine):
        nonlocal now
        for error, seconds in (
            (AdapterError("bad", check="finite"), cache.limits.refusal),
            (StoreError("gone"), cache.limits.failure),
        ):
            lease = Lease(cache, 1)
            await quiet()
            loads.end(name(1), error)
            for _ in range(3):
                with pytest.raises(type(error), match=error.message):
                    await lease.has
                lease = Lease(cache, 1)
                await quiet()
            assert loads.asked[name(1)] == 1
            now += seconds
            loads.asked.clear()
        lease = Lease(cache, 1)
        await quiet()
        loads.end(name(1))
        await lease.has
        assert cache.metrics.remembered_refusals == 6
        assert (cache.metrics.refused_loads, cache.metrics.failed_loads) == (1, 1)

    test(clock=lambda: now)


def test_a_defect_of_the_loader_is_a_typed_error():
    @running
    async def test(cache, loads, engine):
        lease = Lease(cache, 1)
        await quiet()
        loads.end(name(1), ZeroDivisionError("oh"))
        with pytest.raises(AdapterUnavailable, match="ZeroDivisionError: oh"):
            await lease.has

    test()


def test_who_waits_too_long_is_told_why_and_the_load_goes_on():
    @running
    async def test(cache, loads, engine):
        late = Lease(cache, 1, timeout=0.02)
        with pytest.raises(AdapterLoadTimeout):
            await late.has
        first = Lease(cache, 1)
        loads.end(name(1))
        await first.has
        full = Lease(cache, 2, timeout=0.5)
        await quiet()
        loads.end(name(2))
        with pytest.raises(AdapterCacheFull, match="in use"):
            await full.has
        assert cache.residency.memory == {name(1), name(2)}
        assert cache.metrics.timeouts == 2
        await first.end()
        async with cache.lease(name(2)):
            assert loads.asked == {name(1): 1, name(2): 1}

    test(slots=1)


def test_nobody_waits_for_it_any_more_so_it_is_not_begun():
    @running
    async def test(cache, loads, engine):
        leases = [Lease(cache, number) for number in range(8)]
        await quiet()
        for lease in leases[4:]:
            lease.task.cancel()
        await quiet()
        for digest in list(loads.going):
            loads.end(digest)
        await quiet()
        assert set(loads.asked) == {name(n) for n in range(4)}

    test()


def test_too_many_waiting():
    @running
    async def test(cache, loads, engine):
        waiting = [Lease(cache, number) for number in (1, 1, 2)]
        await quiet()
        with pytest.raises(AdapterCacheFull, match="wait"):
            await Lease(cache, 3).has
        assert not any(lease.has.done() for lease in waiting)

    test(waiting=3)


def test_pins_stay_and_come_back_by_themselves_when_the_store_does():
    @running
    async def test(cache, loads, engine):
        cache.pin({name(1)})
        await quiet()
        loads.end(name(1), StoreError("gone"))
        await asyncio.sleep(0.05)
        loads.end(name(1))
        await quiet()
        assert engine.present == {name(1)}
        for number in (2, 3, 4):
            lease = Lease(cache, number)
            await quiet()
            loads.end(lease.digest)
            await lease.has
            await lease.end()
            assert engine.present == {name(1), name(number)}
        cache.pin(set())
        for number in (2, 3):
            await Lease(cache, number).has
        assert engine.present == {name(2), name(3)}

    test(failure=0.02)


def test_a_prefetch_yields_to_requests_and_takes_free_slots_only():
    @running
    async def test(cache, loads, engine):
        cache.prefetch(name(n) for n in range(10, 18))
        await quiet()
        asked = Lease(cache, 1)
        await quiet()
        assert name(1) not in loads.going
        loads.end(name(10))
        await quiet()
        assert name(1) in loads.going, "next, before the other wishes"
        loads.end(name(1))
        await asked.has
        while loads.going:
            loads.end(next(iter(loads.going)))
            await quiet()
        assert engine.present == {name(1), name(10)}
        assert len(cache.residency.memory) == 9

    test()


def test_an_adapter_larger_than_the_memory_tier():
    @running
    async def test(cache, loads, engine):
        small, large = Lease(cache, 1), Lease(cache, 2)
        await quiet()
        loads.end(name(1))
        loads.end(name(2))
        with pytest.raises(AdapterCacheFull, match="1,200 bytes"):
            await large.has
        await small.has

    test(sizes={name(2): 1200})


def test_memory_waits_for_room_and_holds_back_further_loads():
    @running
    async def test(cache, loads, engine):
        leases = [Lease(cache, number) for number in range(12)]
        await quiet()
        while loads.going:
            loads.end(next(iter(loads.going)))
            await quiet()
        assert cache.metrics.memory_bytes == 300
        assert sum(loads.asked.values()) == 7, "three in memory, four that have come and found no room"
        for lease in leases:
            await asyncio.wait_for(lease.has, 10)
            await lease.end()
            await quiet()
            for digest in list(loads.going):
                loads.end(digest)
            await quiet()
        assert cache.metrics.memory_bytes == 300

    test(memory=300)


def test_a_request_that_lingers_in_the_engine_keeps_its_adapter():
    @running
    async def test(cache, loads, engine):
        for number in (1, 2):
            lease = Lease(cache, number)
            await quiet()
            loads.end(lease.digest)
            await lease.has
            await lease.end()
        engine.lingering = {name(1)}
        lease = Lease(cache, 3)
        await quiet()
        loads.end(name(3))
        await lease.has
        assert engine.present == {name(1), name(3)}
        async with asyncio.timeout(10), cache.lease(name(1)):
            pass

    test()


def test_asked_for_while_it_leaves_it_comes_back():
    @running
    async def test(cache, loads, engine):
        first = Lease(cache, 1)
        await quiet()
        loads.end(name(1))
        await first.has
        await first.end()
        engine.held = asyncio.Event()
        second = Lease(cache, 2)
        await quiet()
        loads.end(name(2))
        await quiet()
        assert engine.swapping
        again = Lease(cache, 1)
        await quiet()
        assert name(1) not in cache.residency.engine
        engine.held.set()
        await second.has
        assert not again.has.done()
        await second.end()
        await again.has
        assert loads.asked[name(1)] == 1, "memory had it"
        assert cache.metrics.memory_hits == 1

    test(slots=1)


def test_residency_is_told_as_it_changes():
    @running
    async def test(cache, loads, engine):
        before = cache.residency
        heard = asyncio.create_task(cache.changed(before.version))
        await quiet()
        assert not heard.done()
        cache.prefetch([name(1)])
        await quiet()
        loads.end(name(1))
        after = await heard
        assert after.life == before.life
        assert after.version > before.version
        await quiet()
        assert cache.residency.engine == {name(1)}

    test()


def test_the_end():
    @running
    async def test(cache, loads, engine):
        lease = Lease(cache, 1)
        await quiet()
        await cache.close()
        for waiting in (lease, Lease(cache, 2)):
            with pytest.raises(EngineStopped):
                await waiting.has

    test()


def test_only_digests_are_leased():
    @running
    async def test(cache, loads, engine):
        with pytest.raises(AdapterError, match="something else than a digest"):
            async with cache.lease("../../etc/passwd"):
                pass
        assert not loads.asked

    test()


def test_worth_prefers_small_dear_and_often_used_and_forgets():
    worth = Worth()
    worth.use("small", cost=1.0, size=1)
    worth.use("large", cost=1.0, size=8)
    worth.use("dear", cost=9.0, size=8)
    assert list(worth.cheapest(["small", "large", "dear"])) == ["large", "small", "dear"]
    for _ in range(20):
        worth.use("large", cost=1.0, size=8)
    assert next(worth.cheapest(["small", "large", "dear"])) == "small"
    for number in range(40):  # others come and go, and nobody asks for `large` any more
        worth.use(str(number), cost=1.0, size=1)
        worth.evicted(str(number))
    worth.use("new", cost=1.0, size=1)
    assert next(worth.cheapest(["new", "large"])) == "large"


# --- any order of events --------------------------------------------------------------------------------------------

DIGESTS = [name(n) for n in range(6)]
SIZES = {digest: 100 + 40 * n for n, digest in enumerate(DIGESTS)}
numbers = st.integers(0, len(DIGESTS) - 1)
SLOTS, MEMORY = 2, 520


class Life(RuleBasedStateMachine):
    """Leases, cancellations, pins, loads that end well or badly, an engine that is slow: the promises hold after each."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.leases: list[Lease] = []
        self.version = (-1, None)
        self.pinned: set[str] = set()
        self._do(self._begin)

    async def _begin(self):
        self.loads, self.engine = Loads(sizes=SIZES, limit=2), Engine(SLOTS)
        limits = CacheLimits(slots=SLOTS, memory=MEMORY, loads=2, swaps=2, refusal=0.0, failure=0.0)
        # the same events give the same costs of loads, and so the same evictions
        self.cache = AdapterCache(self.loads, self.engine, limits, clock=itertools.count().__next__)

    def _do(self, action):
        async def main():
            await action()
            await quiet()
            self._count()

        self.loop.run_until_complete(main())

    @rule(number=numbers)
    def ask(self, number):
        async def action():
            self.leases.append(Lease(self.cache, number, timeout=1000))

        self._do(action)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def let_go(self, data):
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self._count()  # a swap may come at once

        async def action():
            if _holds(lease):
                await lease.end()
            else:
                lease.task.cancel()

        self._do(action)

    def _count(self):
        self.engine.leased = Counter(lease.digest for lease in self.leases if _holds(lease))

    @rule(digests=st.sets(st.sampled_from(DIGESTS), max_size=2))
    def pin(self, digests):
        async def action():
            self.cache.pin(digests)
            self.pinned = digests

        self._do(action)

    @rule(number=numbers)
    def prefetch(self, number):
        async def action():
            self.cache.prefetch([name(number)])

        self._do(action)

    @precondition(lambda self: self.loads.going)
    @rule(data=st.data(), error=st.sampled_from([None, None, None, AdapterError("bad"), StoreError("gone")]))
    def a_load_ends(self, data, error):
        digest = data.draw(st.sampled_from(sorted(self.loads.going)))

        async def action():
            self.loads.end(digest, error)

        self._do(action)

    @rule()
    def the_engine_is_in_a_long_step(self):
        if self.engine.held is None:
            self.engine.held = asyncio.Event()

    @rule()
    def the_engine_goes_on(self):
        async def action():
            if self.engine.held is not None:
                self.engine.held.set()
                self.engine.held = None

        self._do(action)

    @invariant()
    def promises(self):
        residency, engine, metrics = self.cache.residency, self.engine, self.cache.metrics
        assert self.cache._stopped is None, "a promise that the engine's or the loads' side saw broken"
        failures = [lease.has.exception() for lease in self.leases if lease.has.done()]
        assert all(failure is None or failure.message in ("bad", "gone") for failure in failures)
        assert set(engine.leased) <= engine.present
        assert set(engine.leased) <= residency.engine <= residency.memory
        assert residency.engine <= engine.present
        if not engine.swapping:
            assert residency.engine == engine.present
        assert metrics.memory_bytes == sum(SIZES[digest] for digest in residency.memory) <= MEMORY
        told = (residency.engine, residency.memory)
        assert (residency.version == self.version[0]) == (told == self.version[1])
        assert residency.version >= self.version[0]
        self.version = residency.version, told

    def teardown(self):
        """Whoever still waits gets an adapter, once the others let go, loads end and the engine goes on."""

        async def action():
            self.engine.held, held = None, self.engine.held
            if held:
                held.set()
            self.cache.pin(set())
            for _ in range(100):
                for digest in list(self.loads.going):
                    self.loads.end(digest)
                await quiet()
                for lease in [lease for lease in self.leases if lease.has.done()]:
                    self.leases.remove(lease)
                    self._count()
                    await lease.end()
            assert not self.leases
            assert self.cache._stopped is None, "a promise that the engine's or the loads' side saw broken"
            await self.cache.close()

        try:
            if hasattr(self, "cache"):
                self.loop.run_until_complete(action())
        finally:
            with contextlib.suppress(RuntimeError):
                self.loop.close()


def _holds(lease):
    return lease.has.done() and lease.has.exception() is None


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
