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

    Of each tenant by itself: one that has fewer requests than others may be let in where those are turned away. And, unless all
    replicas have refused, of each adapter by itself: another one may go to another replica.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._seconds: dict[str, float] = {}  # that an answer takes, by base
        self._told: dict[_Key, tuple[float, EngineOverloaded]] = {}

    def ended(self, base: str, seconds: float) -> None:
        """An answer over this base has taken so long: a running mean of them decides how long a moment is."""
        self._seconds[base] = 0.9 * self._seconds.get(base, seconds) + 0.1 * seconds

    def check(self, tenant: str, choice: Choice) -> None:
        """
        Raises:
            EngineOverloaded: as a moment ago.
        """
        for everywhere in (True, False):
            until, error = self._told.get(_key(tenant, choice, everywhere), (0.0, None))
            if error is not None and self._clock() < until:
                raise copy.copy(error)

    def tell(self, tenant: str, choice: Choice, error: EngineOverloaded) -> None:
        """A replica has turned it away, or all of them."""
        now = self._clock()
        if len(self._told) >= _KEPT:
            self._told = {key: told for key, told in self._told.items() if told[0] > now}
        moment = min(MOST_SECONDS, SHARE * self._seconds.get(choice.base_digest, 0.0))
        # a copy has no traceback, whose frames hold the request
        key = _key(tenant, choice, error.context.get("everywhere", False))
        self._told[key] = now + moment, copy.copy(error)


_Key = tuple[str, str] | tuple[str, str, str | None]
"""Tenant and base; unless of all replicas, the adapter too."""


def _key(tenant: str, choice: Choice, everywhere: bool) -> _Key:
    return (tenant, choice.base_digest) if everywhere else (tenant, choice.base_digest, choice.adapter)
