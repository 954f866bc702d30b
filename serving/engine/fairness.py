"""Whose turn it is: tenants share an engine by the tokens that they were served, however many requests each has waiting.

Virtual token counters (Sheng et al., OSDI 2024, arXiv:2401.00588): of the tenants that wait, the one which was served least
is next. A tenant that comes to wait begins where the others are: having been away earns nothing. Within a tenant the
oldest request is first.

A queue that is always full makes nothing faster, and everybody wait. So who has waited for longer than bursts last gives way to
the next request of the same tenant (as in CoDel, Nichols and Jacobson, 2012, and the adaptive LIFO of Maurer, "Fail at Scale", 2015):
what is answered has waited little, however many ask. Where nobody else asks, nobody gives way.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.engine.scheduler import Sequence

ANSWER_TOKEN = 2
"""What a token of an answer counts, where one of a prompt counts 1: the paper's weights, near what a step costs."""

PATIENCE = 0.25
"""Seconds for which a new request waits before it gives way to another one of its tenant's: a fraction of a short answer's time."""

_KEPT = 1024
"""Tenants whose counters are kept without looking which of them still say anything."""


def surplus(waiting: Mapping[str, int], tenant: str) -> str | None:
    """The tenant whose youngest request gives way to one of this tenant's (longest queue drop; McKenney, 1991).

    Args:
        waiting: requests of each tenant.
    """
    most = max(waiting, key=lambda t: waiting[t], default=None)
    return None if most is None or waiting[most] < waiting.get(tenant, 0) + 2 else most


class FairQueue:
    """Requests that wait for a place, and what each tenant was served."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._queues: dict[str, deque[Sequence]] = {}  # of tenants that wait
        self._served: dict[str, int] = {}
        self._last: str | None = None  # whose request was taken last

    def __len__(self) -> int:
        return sum(map(len, tuple(self._queues.values())))

    def __iter__(self) -> Iterator[Sequence]:
        """Any thread may: copying a dictionary's values or a deque is one step for Python's threads."""
        for queue in tuple(self._queues.values()):
            yield from tuple(queue)

    @property
    def tenants(self) -> set[str]:
        return set(self._queues)

    @property
    def new(self) -> int:
        """Requests of which nothing was computed yet."""
        return self.new_of_each.total()

    @property
    def new_of_each(self) -> Counter[str]:
        """The same, of each tenant."""
        return Counter(sequence.tenant for sequence in self if not sequence.preempted)

    def add(self, sequence: Sequence) -> None:
        """A new request."""
        tenant = sequence.tenant
        if tenant not in self._queues:
            floor = self._floor()
            if len(self._served) > _KEPT:  # below the floor is as good as never served
                self._served = {t: n for t, n in self._served.items() if n > floor or t in self._queues}
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
            self._queues[tenant] = deque()
        self._queues[tenant].append(sequence)
        sequence.waits_since = self._clock()

    def put_back(self, sequence: Sequence) -> None:
        """One that had a place and lost it: the first of its tenant's."""
        self._queues.setdefault(sequence.tenant, deque()).appendleft(sequence)

    def first(self) -> Sequence | None:
        """The next request; it stays until it is removed."""
        if not self._queues:
            return None
        return self._queues[min(self._queues, key=self.served)][0]

    def take(self, sequence: Sequence) -> None:
        """It has its place."""
        self._last = sequence.tenant
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        """
        Args:
            tokens: weighted, see `ANSWER_TOKEN`.
        """
        self._served[tenant] = self.served(tenant) + tokens

    def served(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    def gives_way(self, tenant: str, fetched: bool = False) -> Sequence | None:
        """The request that gives way to a new one of this tenant's when too many wait: the youngest new one of whoever has most,
        if that leaves them at least as many as the tenant then has; else one of its own.

        Args:
            fetched: the new one has had its adapter loaded.
        """
        most = surplus(self.new_of_each, tenant)
        if most is not None:
            return self._queues[most][-1]
        own = self._replaceable().get(tenant, [])
        if fetched:
            return own[-1] if own else None
        return own[0] if own and self._stale(own[0]) else None

    @property
    def impatient(self) -> frozenset[str]:
        """Tenants of which one that waits gives way to their next. Any thread may ask."""
        return frozenset(tenant for tenant, own in self._replaceable().items() if self._stale(own[0]))

    def _replaceable(self) -> dict[str, list[Sequence]]:
        """Of each tenant the new requests that have had nothing done for them, in order of arrival."""
        found: dict[str, list[Sequence]] = {}
        for sequence in self:
            if not (sequence.preempted or sequence.fetched):
                found.setdefault(sequence.tenant, []).append(sequence)
        return found

    def _stale(self, sequence: Sequence) -> bool:
        return sequence.waits_since < self._clock() - PATIENCE

    def _floor(self) -> int:
        """Where who comes now begins: at the least served of those that wait, or else at whoever had the last turn."""
        if self._queues:
            return min(map(self.served, self._queues))
        return 0 if self._last is None else self.served(self._last)
