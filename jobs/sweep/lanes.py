"""Which course has which slot: lanes are taken, parted, freed, and given to courses that wait."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.sweep.course import Course
from jobs.sweep.lane import Held, Lane
from orchestrator.modeling.decoder import Decoder, remove_adapter


class Lanes:
    """The slots of one network.

    Nobody waits while a slot is free, whatever is called.

    Args:
        most: that are trained at once.
    """

    def __init__(self, network: Decoder, most: int):
        self._network = network
        self._slots = [f"lane{number}" for number in range(most)]
        self.seated: list[Lane] = []
        self.waiting: list[Held] = []

    def __iter__(self) -> Iterator[Lane]:
        return iter(self.seated)

    def __len__(self) -> int:
        return len(self.seated)

    @property
    def most(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        return len(self._slots) - len(self.seated)

    @property
    def courses(self) -> list[tuple[Course, Lane | Held]]:
        """Each with where it is."""
        return [(course, one) for one in self._all for course in one.courses]

    @property
    def _all(self) -> list[Lane | Held]:
        return [*self.seated, *self.waiting]

    def join(self, course: Course) -> Lane | None:
        """Ride a lane that has come the way which this course would have come, if there is one."""
        for lane in self.seated:
            way = range(max(1, lane.progress.step))
            if lane.progress.step < course.total_steps and all(lane.course.at(n) == course.at(n) for n in way):
                lane.courses.append(course)
                return lane
        return None

    def add(self, held: Held) -> None:
        """Go on in a free slot, or wait for one.

        Raises:
            ModelError: its adapter does not fit the network.
        """
        if not self.free:
            self.waiting.append(held)
            return
        taken = {lane.slot for lane in self.seated}
        slot = next(slot for slot in self._slots if slot not in taken)
        self.seated.append(Lane(self._network, slot, held))

    def leave(self, trial: str) -> None:
        for one in self._all:
            one.courses = [course for course in one.courses if course.trial != trial]
        self.settle()

    def part_ways(self) -> None:
        """Before a step: courses on which it is not the same leave their lane for another."""
        for lane in list(self.seated):
            for held in lane.part_ways():
                self.add(held)

    def settle(self) -> None:
        """Free the lanes that nobody rides any more, and give them to those that wait, in their order."""
        for lane in self.seated:
            if not lane.courses:
                remove_adapter(self._network, lane.slot)
        self.seated = [lane for lane in self.seated if lane.courses]
        self.waiting, waited = [], [held for held in self.waiting if held.courses]
        for held in waited:
            self.add(held)
