"""A lane: one course of training in one adapter slot, for all trials that are still the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jobs.sweep.course import Course
from jobs.sweep.passes import Part
from jobs.train.engines import SingleEngine, State
from jobs.train.packing import Rows, dropout_seed, pack
from jobs.train.setup import Place, validation_batches
from jobs.train.steps import Progress
from orchestrator.modeling.decoder import Decoder, adapter_parameters, add_adapter, remove_adapter


@dataclass
class Held:
    """A lane without a slot: what it needs to go on in one."""

    courses: list[Course]
    progress: Progress
    state: State | None = None
    """None before the first step: the seed says what the adapter is."""
    stayed: Sequence[Course] = ()
    """In their lanes, when this one and others parted from them."""


class Lane:
    """Trains one adapter on the way that all its trials have in common.

    Raises:
        ModelError: the adapter does not fit the model, which is left as it was.
    """

    def __init__(self, network: Decoder, slot: str, held: Held):
        self.slot, self.courses, self.progress = slot, held.courses, held.progress
        try:
            add_adapter(network, slot, self.course.shape, self.course.seed)
        except Exception:
            remove_adapter(network, slot)
            raise
        parameters = adapter_parameters(network, slot)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self.engine = SingleEngine(parameters, self.course.spec.train, steady=True)
        if held.state is not None:
            self.engine.load(held.state, self.progress.step)

    @property
    def course(self) -> Course:
        """That of any of its trials, so far."""
        return self.courses[0]

    def held(self) -> Held:
        return Held(self.courses, self.progress, self.engine.state())

    def part_ways(self) -> list[Held]:
        """Leave to others the trials whose next step is another one. Those that end first stay here: their results come soon,
        and then the slot is free again."""
        if len(self.courses) == 1:
            return []
        ways: dict[tuple[object, ...], list[Course]] = {}
        for course in sorted(self.courses, key=lambda course: course.total_steps):
            ways.setdefault(course.at(self.progress.step), []).append(course)
        self.courses, *others = ways.values()
        return [Held(courses, replace(self.progress), self.engine.state()) for courses in others]

    def micro_batches(self, number: int, rows: Rows, place: Place, beside: int) -> list[Callable[[], Part]]:
        """This rank's of the next step, weighted and seeded as the trial's own run has them; each is packed when it is called.

        Args:
            beside: forward passes that share the memory of one. Micro-batches are cut so much smaller than the trial's own run has
                them: that changes no more than rounding, but with dropout, where each micro-batch has its own masks, they are not.
        """
        step, batches = self.progress.step, self.course.batches
        labelled = int(rows.labelled[batches.rows(step)].sum())
        packed = partial(pack, rows, labelled=labelled, device=place.device, share=self.course.shape.dropout == 0.0)

        def part(micro: int, chosen: list[int]) -> Part:
            return Part(number, self.slot, packed(chosen), dropout_seed(self.course.seed, step, place.rank, micro))

        mine = enumerate(batches.micro_batches(step, place.rank, 1 if self.course.shape.dropout else beside))
        return [partial(part, micro, chosen) for micro, chosen in mine if chosen]

    def validation(self, number: int, rows: Any, place: Place, network: Decoder) -> list[Callable[[], Part]]:
        """This rank's micro-batches of all validation rows, cut as the trial's own run has them."""
        batches = validation_batches(rows.lengths, network, place, self.course.spec.train)

        def part(chosen: list[int]) -> Part:
            return Part(number, self.slot, pack(rows, chosen, 1, place.device, share=True))

        mine = (chosen for step in range(batches.total_steps) for chosen in batches.micro_batches(step, place.rank))
        return [partial(part, chosen) for chosen in mine if chosen]
