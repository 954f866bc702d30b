"""The cache's promises, one by one, with loads and an engine that wait for the test: nothing here takes time."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.errors import (
    AdapterCacheFull,
    AdapterError,
    AdapterLoadTimeout,
    AdapterUnavailable,
    EngineStopped,
    StoreError,
)
from serving.adapters.eviction import Worth
from tests.unit.adapters.simulated import Lease, name, quiet, running


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
