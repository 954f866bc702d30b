"""Requests that wait for their adapter while the engine is full. Milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from orchestrator.errors import EngineOverloaded
from serving.arrivals import Arrivals
from serving.engine.protocol import Backlog


class Waiting:
    """Requests that wait for an adapter until they are told to go on."""

    def __init__(self, room: int, waiting: Mapping[str, int] | None = None):
        self.backlog = Backlog(room, waiting or {})
        self.arrivals = Arrivals(lambda: self.backlog)
        self.go_on = asyncio.Event()

    async def ask(self, tenant: str) -> asyncio.Task[str]:
        async def wait() -> str:
            async with self.arrivals.held(tenant):
                await self.go_on.wait()
            await asyncio.sleep(0)  # whoever was let in is not called away afterwards
            return tenant

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        return task


def test_those_who_wait_for_adapters_fill_the_engines_room():
    async def run() -> None:
        waiting = Waiting(room=2)
        tasks = [await waiting.ask(tenant) for tenant in ("a", "b", "a", "c")]
        assert [task.done() for task in tasks] == [False, False, True, True]
        for refused in tasks[2:]:
            with pytest.raises(EngineOverloaded, match="as may"):
                await refused
        waiting.go_on.set()
        assert await asyncio.gather(*tasks[:2]) == ["a", "b"]
        assert not waiting.arrivals._held
        assert await (await waiting.ask("c")) == "c"

    asyncio.run(run())


def test_a_tenant_that_has_fewer_takes_the_youngests_room_of_the_one_that_has_most():
    async def run() -> None:
        waiting = Waiting(room=3)
        flood = [await waiting.ask("flood") for _ in range(3)]
        other = await waiting.ask("other")
        assert [task.done() for task in flood] == [False, False, True]
        assert isinstance(flood[2].exception(), EngineOverloaded)
        assert (await waiting.ask("other")).exception()  # it would have two, as the flood has
        waiting.go_on.set()
        assert await asyncio.gather(*flood[:2], other) == ["flood", "flood", "other"]

    asyncio.run(run())


def test_what_waits_in_the_engine_counts_and_the_engine_itself_drops_it():
    async def run() -> None:
        waiting = Waiting(room=0, waiting={"flood": 2})
        assert (await waiting.ask("flood")).exception()
        other = await waiting.ask("other")
        waiting.go_on.set()
        assert await other == "other"

    asyncio.run(run())


def test_who_has_waited_in_the_engine_for_long_gives_way_to_one_that_waits_for_its_adapter():
    async def run() -> None:
        waiting = Waiting(room=0, waiting={"a": 1})
        assert (await waiting.ask("a")).exception()
        waiting.backlog = Backlog(0, {"a": 1}, frozenset("a"))
        other, mine = await waiting.ask("b"), await waiting.ask("a")
        assert other.exception()
        assert (await waiting.ask("a")).exception()  # one for one
        waiting.go_on.set()
        assert await mine == "a"

    asyncio.run(run())


def test_who_needs_to_wait_for_no_adapter_is_asked_only_whether_the_engine_has_room():
    async def run() -> None:
        waiting = Waiting(room=1)
        assert not (await waiting.ask("a")).done()
        waiting.arrivals.check("a")  # it waits behind nobody
        waiting.backlog = Backlog(0, {"a": 2, "b": 1})
        for tenant in ("a", "b"):
            with pytest.raises(EngineOverloaded):
                waiting.arrivals.check(tenant)
        waiting.arrivals.check("c")  # one of a's gives way
        waiting.backlog = Backlog(0, {"a": 1}, frozenset("a"))
        waiting.arrivals.check("a")  # to itself, having waited for long
        with pytest.raises(EngineOverloaded):
            waiting.arrivals.check("b")

    asyncio.run(run())


def test_who_is_called_away_by_others_is_not_taken_for_displaced():
    async def run() -> None:
        waiting = Waiting(room=1)
        task = await waiting.ask("a")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not waiting.arrivals._held

    asyncio.run(run())
