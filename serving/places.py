"""How much of a replica one tenant may hold at once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from orchestrator.errors import EngineOverloaded


class Places:
    """Room for requests, whatever they wait for (an adapter, a place in the batch), of which something is always left.

    A tenant may hold as many places as are free, so alone half of them, and two who flood a third each: who comes then still
    finds some, and none is set apart for anybody (dynamic thresholds; Choudhury and Hahne, 1998).
    """

    def __init__(self, total: int):
        self.total = total
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def held(self, tenant: str) -> Iterator[None]:
        """
        Raises:
            EngineOverloaded: the tenant holds too many.
        """
        taken = self._held.total()
        if self._held[tenant] >= self.total - taken:
            raise EngineOverloaded(
                f"{taken} requests are here already, {self._held[tenant]} of them of this tenant.",
                hint="Ask again later.",
                waiting=taken,
            )
        self._held[tenant] += 1
        try:
            yield
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]
