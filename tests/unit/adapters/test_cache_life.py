"""The cache's promises, in any order of events. Hypothesis takes 15 seconds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.errors import AdapterError, StoreError
from serving.adapters.cache import AdapterCache, CacheLimits
from tests.unit.adapters.simulated import Engine, Lease, Loads, name, quiet

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
