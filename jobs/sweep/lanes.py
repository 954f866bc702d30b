"""Which course has which slot: lanes are taken, parted, freed, and given to courses that wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from jobs.sweep.course import Course
from jobs.sweep.lane import Held, Lane
from orchestrator.modeling.decoder import Decoder, remove_adapter


class Lanes:
    """The slots of one network.

    Nobody waits while a slot is free, but for those that part from others at one step: they go on at one step as well, since the
    scheduler compares them at the end of their epoch.

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

    def alike(self, course: Course) -> Lane | Held | None:
        """A lane that has come the way which this course would have come, if there is one."""
        for lane in self._all:
            done = lane.progress.step
            if done < course.total_steps and in_common(lane.courses[0], course, max(1, done)) == max(1, done):
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

    def take_up(self, several: Sequence[Held], stayed: Sequence[Sequence[str]]) -> None:
        """Go on as a snapshot has it.

        Args:
            stayed: of each, the trials that did when it parted.
        """
        by_name = {course.trial: course for held in several for course in held.courses}
        together: dict[tuple[str, ...], list[Course]] = {}
        for held, names in zip(several, stayed, strict=True):
            known = tuple(name for name in names if name in by_name)
            if known:
                held.stayed = together.setdefault(known, [by_name[name] for name in known])
                self.waiting.append(held)
            else:
                self.add(held)
        self._go_on()

    def leave(self, trial: str) -> None:
        for one in self._all:
            one.courses = [course for course in one.courses if course.trial != trial]
        self.settle()

    def part_ways(self) -> None:
        """Before a step: courses on which it is not the same leave their lane for another."""
        parted: list[Held] = []
        stayed: list[Course] = []
        for lane in self.seated:
            if others := lane.part_ways():
                parted += others
                stayed += lane.courses
        for held in parted:
            held.stayed = stayed
        self.waiting += parted
        self._go_on()

    def settle(self) -> None:
        """Free the lanes that nobody rides any more, and give them to those that wait."""
        for lane in self.seated:
            if not lane.courses:
                remove_adapter(self._network, lane.slot)
        self.seated = [lane for lane in self.seated if lane.courses]
        self.waiting = [held for held in self.waiting if held.courses]
        self._go_on()

    def _go_on(self) -> None:
        """Those that wait, in their order; those that parted at one step once there is room for all, or nobody is left who stayed."""
        waited, self.waiting = self.waiting, []
        seated = {id(course) for lane in self.seated for course in lane.courses}
        for _, several in groupby(waited, key=lambda held: id(held.stayed)):
            together = list(several)
            if len(together) > self.free and any(id(course) in seated for course in together[0].stayed):
                self.waiting += together
                continue
            for held in together:
                self.add(held)


def in_common(one: Course, other: Course, most: int) -> int:
    """How many of their first `most` steps are the same."""
    steps = min(most, one.total_steps, other.total_steps)
    return next((n for n in range(steps) if one.at(n) != other.at(n)), steps)
