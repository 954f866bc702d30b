"""What leaves a tier first: GreedyDual-Size with Frequency (Cherkasova, HPL-98-69R1).

Adapters differ 64-fold in size and, by their distance, in what it costs to get them back, and a tenant's traffic comes in
bursts. LRU would give up eight small adapters for a large one that was asked for once. Here an entry is worth uses x cost /
size above a clock; the clock is the worth of what was evicted last, so old uses fade and nothing stays for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Worth:
    """Of the entries of one tier."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._uses: dict[str, int] = {}
        self._worth: dict[str, float] = {}

    def use(self, digest: str, cost: float, size: float) -> None:
        """
        Args:
            cost: seconds to get it back, or any unit that the tier keeps to.
            size: what it takes of the tier's budget.
        """
        self._uses[digest] = uses = self._uses.get(digest, 0) + 1
        self._worth.pop(digest, None)  # of equal worth the one used last is last
        self._worth[digest] = self._clock + uses * cost / max(size, 1)

    def evicted(self, digest: str) -> None:
        self._uses.pop(digest, None)
        self._clock = max(self._clock, self._worth.pop(digest, self._clock))

    def cheapest(self, among: Iterable[str]) -> Iterator[str]:
        """From the one that should go first."""
        order = {digest: number for number, digest in enumerate(self._worth)}
        return iter(sorted(among, key=lambda d: (self._worth.get(d, 0.0), order.get(d, -1))))
