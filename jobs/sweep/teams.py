"""Passes computed beside each other in one process, each by a team of threads with its share of the cores.

Two passes with a core each are faster than one after the other with both: nothing waits for what is not parallel, and no matmul is
split. They share the network, which is only read; each lane's gradient belongs to one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from jobs.sweep.passes import Part


class Teams:
    """
    Args:
        cores: of the process, all of which a single pass uses.
    """

    def __init__(self, cores: int):
        self._cores = cores
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def run(self, tasks: Sequence[Callable[[], None]], beside: int) -> None:
        """All tasks, `beside` at a time; what is left over goes one by one, with all cores.

        Raises:
            Exception: the first task's that failed, once none of them is under way.
        """
        even = len(tasks) - len(tasks) % beside if beside > 1 else 0
        if even:
            begun = self._begun(tasks[:even], beside)
            for one in begun:
                one.result()
        for task in tasks[even:]:
            task()

    def _begun(self, tasks: Sequence[Callable[[], None]], beside: int) -> list[Future[None]]:
        """All of them, once they have ended.

        How many threads a loop takes is each thread's own number, but it is what was said last, by whomever, when it computes for the
        first time; for matmuls (MKL) the process has one number. So it is also said for as long as teams compute: with all cores each,
        they would wait for each other's threads at the end of every loop.
        """
        share = max(1, self._cores // beside)
        if beside not in self._pools:
            self._pools[beside] = ThreadPoolExecutor(beside, "adaptory-team", torch.set_num_threads, (share,))
        torch.set_num_threads(share)
        try:
            begun = [self._pools[beside].submit(task) for task in tasks]
            wait(begun)
        finally:
            torch.set_num_threads(self._cores)
        return begun


def apart(passes: Iterable[list[Part]]) -> Iterator[list[list[Part]]]:
    """Consecutive passes that have no lane in common, as many as there are: those may be computed beside each other, and each lane's
    gradient is still summed in its order."""
    several: list[list[Part]] = []
    taken: set[int] = set()
    for parts in passes:
        lanes = {part.lane for part in parts}
        if lanes & taken:
            yield several
            several, taken = [], set()
        several.append(parts)
        taken |= lanes
    if several:
        yield several
