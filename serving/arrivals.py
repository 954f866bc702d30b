"""Requests on their way to an engine: those that wait for their adapter."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from orchestrator.errors import EngineOverloaded
from serving.engine.fairness import surplus
from serving.engine.protocol import Backlog


@dataclass(eq=False)
class _Arrival:
    tenant: str
    patience: asyncio.Timeout


class Arrivals:
    """Turns away what the engine would turn away, before an adapter is fetched for it and another one has to leave for that.

    Whoever waits for an adapter counts as waiting in the engine's queue, and gives way as there: when there is no room, the
    youngest of the tenant that has most of those who wait, or one of the same tenant that has waited in the engine for long. A
    request whose adapter is in the engine waits behind none of them.

    Args:
        backlog: the engine's.
    """

    def __init__(self, backlog: Callable[[], Backlog]):
        self._backlog = backlog
        self._held: list[_Arrival] = []

    @asynccontextmanager
    async def held(self, tenant: str) -> AsyncIterator[None]:
        """While the block runs, a request of this tenant is on its way.

        Raises:
            EngineOverloaded: the engine would not take it, or it had to give way.
        """
        self._make_room(tenant)
        try:
            async with asyncio.timeout(None) as patience:
                arrival = _Arrival(tenant, patience)
                self._held.append(arrival)
                try:
                    yield
                finally:
                    self._leave(arrival)
        except TimeoutError:
            raise _overloaded() from None

    def check(self, tenant: str) -> None:
        """Without troubling the engine's own thread, of a request that could go to it now.

        Raises:
            EngineOverloaded: the engine would not take it.
        """
        if not self._backlog().takes(tenant):
            raise _overloaded()

    def _make_room(self, tenant: str) -> None:
        backlog = self._backlog()
        if len(self._held) < backlog.room:
            return
        waiting = Counter(arrival.tenant for arrival in self._held) + Counter(backlog.waiting)
        most = surplus(waiting, tenant)
        if most is None:
            if tenant in backlog.impatient and not any(arrival.tenant == tenant for arrival in self._held):
                return  # the engine itself drops the one that has waited, for one
            raise _overloaded()
        youngest = next((arrival for arrival in reversed(self._held) if arrival.tenant == most), None)
        if youngest is not None:  # else the engine itself drops one of that tenant's
            youngest.patience.reschedule(asyncio.get_running_loop().time())
            self._leave(youngest)

    def _leave(self, arrival: _Arrival) -> None:
        if arrival in self._held:
            self._held.remove(arrival)


def _overloaded() -> EngineOverloaded:
    return EngineOverloaded("As many requests wait for the engine as may.", hint="Ask again later.")
