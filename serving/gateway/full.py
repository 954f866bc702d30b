"""Who was just told that an engine is full."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

from orchestrator.errors import EngineOverloaded
from orchestrator.routing.table import Choice

MOST_SECONDS = 0.25
"""A quarter of what clients are told to wait."""

SHARE = 1 / 16
"""Of an answer's time. In twice as long as many places get free as requests may wait (`serving.replica.PLACES_A_WAITER`), so the batch
stays full."""

_KEPT = 4096
"""Entries that are kept without looking which of them have ended."""


class FullEngines:
    """Repeats an engine's answer for a moment to whoever asks again for the same: a flood costs its tokens, its reservations and
    a call of the engine's process once for each moment, and not once for each request.

    Of each tenant by itself: one that has fewer requests than others may be let in where those are turned away. And, where a
    base has several replicas, of each adapter by itself: another one may have another replica.

    Args:
        lone: whether a base, by its digest, has one replica.
    """

    def __init__(self, lone: Callable[[str], bool] = lambda base: False, clock: Callable[[], float] = time.monotonic):
        self._lone, self._clock = lone, clock
        self._seconds: dict[str, float] = {}  # that an answer takes, by base
        self._told: dict[tuple[str, str, str | None], tuple[float, EngineOverloaded]] = {}

    def ended(self, base: str, seconds: float) -> None:
        """An answer over this base has taken so long: a running mean of them decides how long a moment is."""
        self._seconds[base] = 0.9 * self._seconds.get(base, seconds) + 0.1 * seconds

    def check(self, tenant: str, choice: Choice) -> None:
        """
        Raises:
            EngineOverloaded: as a moment ago.
        """
        until, error = self._told.get(self._key(tenant, choice), (0.0, None))
        if error is not None and self._clock() < until:
            raise copy.copy(error)

    def tell(self, tenant: str, choice: Choice, error: EngineOverloaded) -> None:
        """The engine has turned it away."""
        now = self._clock()
        if len(self._told) >= _KEPT:
            self._told = {key: told for key, told in self._told.items() if told[0] > now}
        moment = min(MOST_SECONDS, SHARE * self._seconds.get(choice.base_digest, 0.0))
        # a copy has no traceback, whose frames hold the request
        self._told[self._key(tenant, choice)] = now + moment, copy.copy(error)

    def _key(self, tenant: str, choice: Choice) -> tuple[str, str, str | None]:
        return tenant, choice.base_digest, None if self._lone(choice.base_digest) else choice.adapter
