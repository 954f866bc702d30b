"""Who was just told that an engine is full."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable

from orchestrator.errors import EngineOverloaded
from orchestrator.routing.table import Choice

SECONDS = 0.1
"""A tenth of what clients are told to wait, and a few steps of an engine: a place that gets free in this time is taken by the
one who waits for it already."""


class FullEngines:
    """Repeats an engine's answer for a moment to whoever asks again for the same: a flood costs its tokens, its reservations and
    a call of the engine's process once for each moment, and not once for each request.

    Of each tenant by itself: one that has fewer requests than others may be let in where those are turned away. And of each
    adapter by itself: another one may have another replica.
    """

    def __init__(self, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._clock = seconds, clock
        self._told: OrderedDict[tuple[str, str, str | None], tuple[float, EngineOverloaded]] = OrderedDict()

    def check(self, tenant: str, choice: Choice) -> None:
        """
        Raises:
            EngineOverloaded: as a moment ago.
        """
        now = self._clock()
        while self._told and next(iter(self._told.values()))[0] <= now:
            self._told.popitem(last=False)
        if (told := self._told.get(_key(tenant, choice))) is not None:
            raise copy.copy(told[1])

    def tell(self, tenant: str, choice: Choice, error: EngineOverloaded) -> None:
        """The engine has turned it away."""
        key = _key(tenant, choice)
        self._told[key] = self._clock() + self._seconds, error
        self._told.move_to_end(key)


def _key(tenant: str, choice: Choice) -> tuple[str, str, str | None]:
    return tenant, choice.base_digest, choice.adapter
