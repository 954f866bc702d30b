"""Many trials trained on one copy of the base: the packed group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from jobs.sweep import snapshots
from jobs.sweep.course import Course, why_alone
from jobs.sweep.lane import Held, Lane
from jobs.sweep.lanes import Lanes, in_common
from jobs.sweep.passes import Part, joint_passes, run
from jobs.sweep.planning import Counted, Pace, Way
from jobs.sweep.reports import Compute, TrialReport, TrialState
from jobs.sweep.snapshots import Snapshot
from jobs.sweep.teams import Teams, apart
from jobs.train.artifact import write_trained_adapter
from jobs.train.setup import Place, agreed_micro_batch_tokens
from jobs.train.steps import Progress, diverged, take_step
from orchestrator.errors import NoFreeLane, TrainingDiverged, TrialRunsAlone
from orchestrator.modeling.decoder import Decoder, adapter_tensors
from orchestrator.modeling.plain import PlainDecoder
from orchestrator.spec.job import JobSpec, LoraTuning, TrainSpec


@dataclass(frozen=True)
class Finished:
    """A trial that has taken its last step, kept until it is closed."""

    tuning: LoraTuning
    step: int
    adapter: dict[str, Tensor]


class Forerunner(NamedTuple):
    """A trial that is over, and had another one's way for so many steps."""

    trial: str
    steps: int
    total_steps: int
    """Of the other one."""


class PackedGroup:
    """Trials in lanes of one network; to be driven by the same calls on every rank.

    Trials whose steps have been the same so far ride one lane, and part where they differ: a trial costs only what no other
    trial computes. Where no lane is free at a parting, those that end later wait for one.

    Args:
        network: the frozen base, whole on every rank; adapters come and go in its slots.
        rows: of training; `lengths` and `labelled` beside the rows themselves.
        validation_rows: None or empty: no validation.
        tokens_at_once: most in one forward pass of a worker; micro-batches of several lanes that fit go together.
        lanes: most that are trained at once.
        pace: decides how many of them go together; None: as many as fit into a pass, one pass after the other.
    """

    def __init__(
        self,
        network: Decoder | PlainDecoder,
        rows: Any,
        validation_rows: Any | None,
        place: Place,
        *,
        tokens_at_once: int,
        lanes: int,
        pace: Pace | None = None,
    ):
        self._network: Any = network  # a `Decoder`, or no trial is ever opened
        self._rows, self._validation_rows, self._place = rows, validation_rows, place
        self._tokens_at_once, self.pace = tokens_at_once, pace
        # once for all trials and kept with a snapshot: what is free changes, and how rows are cut must not
        self._auto_tokens = min(tokens_at_once, agreed_micro_batch_tokens(TrainSpec(), network, place, rows.lengths))
        self._lanes = Lanes(cast(Decoder, network), lanes)
        self._teams = Teams(torch.get_num_threads())
        self._finished: dict[str, Finished] = {}
        self._over: list[tuple[Course, int]] = []
        """Courses of which this group has taken their last step, and how many those were."""
        self.computed, self.alone = Compute(), Compute()
        """What was computed, and what runs of their own would have computed for the same trials up to the same steps."""

    # --- trials come and go

    @property
    def free(self) -> int:
        """Lanes that nobody has. A trial that begins like one which is still at its beginning needs none."""
        return self._lanes.free

    @property
    def steps(self) -> dict[str, int]:
        """Optimiser steps that each open trial has behind it, those included that wait for a lane or have finished."""
        training = {course.trial: one.progress.step for course, one in self._lanes.courses}
        return training | {trial: finished.step for trial, finished in self._finished.items()}

    @property
    def finished(self) -> list[str]:
        """Trials that have taken their last step and are not closed yet."""
        return list(self._finished)

    def open(self, trial: str, spec: JobSpec) -> None:
        """Begin a trial: on a lane that has come the same way so far, however far that is, else on one of its own.

        Args:
            spec: of the trial as a run of its own.

        Raises:
            TrialRunsAlone: it cannot share this network.
            NoFreeLane: every lane is taken by a trial that begins otherwise.
            ModelError: its adapter does not fit the model.
        """
        assert trial not in self.steps, f"trial {trial} is open already"
        if reason := why_alone(spec, self._network):
            raise TrialRunsAlone(
                f"Trial {trial} cannot be packed: {reason}.",
                hint="It can be trained as a run of its own: set sweep.placement to concurrent or one_by_one.",
                trial=trial,
                reason=reason,
            )
        course = self._course(trial, spec)
        if lane := self._lanes.alike(course):
            lane.courses.append(course)
            self.alone.add_all(lane.progress.step, lane.progress.tokens)
            return
        if not self.free:
            raise NoFreeLane(
                f"Trial {trial} finds all {self._lanes.most} lanes taken.",
                hint="Wait for a trial to end, or raise sweep.max_concurrent.",
                trial=trial,
                lanes=self._lanes.most,
            )
        self._lanes.add(Held([course], Progress(0, course.total_steps)))

    def total_steps(self, trial: str) -> int:
        return next(course.total_steps for course, _ in self._lanes.courses if course.trial == trial)

    def company(self, trial: str) -> list[str]:
        """Other trials on its lane: what they have reported until now is what it would have reported."""
        lanes = [id(lane) for course, lane in self._lanes.courses if course.trial == trial]
        return [course.trial for course, lane in self._lanes.courses if id(lane) in lanes and course.trial != trial]

    def forerunner(self, trial: str, spec: JobSpec) -> Forerunner | None:
        """Of the trials that are over, the one that came the furthest on the way of a trial which would have to begin anew: what that
        one reported until then, this one would report."""
        if why_alone(spec, self._network):
            return None
        course = self._course(trial, spec)
        if self._lanes.alike(course):
            return None
        ways = [Forerunner(o.trial, in_common(o, course, steps), course.total_steps) for o, steps in self._over]
        return max((way for way in ways if way.steps), key=lambda way: way.steps, default=None)

    def close(self, trial: str) -> None:
        """End a trial, wherever it stands. Its lane goes on for others that ride it, or is free at once."""
        self._finished.pop(trial, None)
        self._over += [(course, one.progress.step) for course, one in self._lanes.courses if course.trial == trial]
        self._lanes.leave(trial)

    def adapter(self, trial: str) -> dict[str, Tensor]:
        """The trial's weights as a run would publish them: PEFT's names, in the dtype of training.

        Raises:
            KeyError: it is not open, or waits for a lane.
        """
        if trial in self._finished:
            return self._finished[trial].adapter
        slot = {course.trial: one.slot for course, one in self._lanes.courses if isinstance(one, Lane)}[trial]
        return {name: t.to("cpu", copy=True) for name, t in adapter_tensors(self._network, slot).items()}

    def write_adapter(self, trial: str, directory: Path, base_name: str) -> None:
        """A finished trial's adapter as PEFT's two files."""
        write_trained_adapter(directory, self._finished[trial].tuning, base_name, self._finished[trial].adapter)

    # --- training

    def step(self) -> list[TrialReport]:
        """One optimiser step of every lane.

        Returns:
            A report of each trial that took it; one that finished stays open for its adapter, one that diverged is closed.

        Raises:
            OutOfMemory: with what to lower.
        """
        self._lanes.part_ways()
        reports: list[TrialReport] = []
        for lane, (loss, tokens) in zip(self._lanes, self._gradients(), strict=True):
            lane.progress.loss = loss
            self.alone.add(int(tokens), len(lane.courses))
            try:
                take_step(lane.engine, lane.progress, lane.course.learning_rate(lane.progress.step))
            except TrainingDiverged as error:
                reports += self._diverged(lane, error)
            else:
                lane.progress.tokens += int(tokens)
        due = [lane for lane in self._lanes if any(course.reports(lane.progress.step) for course in lane.courses)]
        losses = dict(zip((lane.slot for lane in due), self._validation_losses(due), strict=True))
        for lane in self._lanes:
            reports += self._reports(lane, losses.get(lane.slot))
        self._lanes.settle()
        return reports

    def _gradients(self) -> list[list[float]]:
        """Leave each lane's gradient of its next step with its engine; returns (loss, tokens) of each, over all workers."""
        self._network.train()
        # one that asks for it has it for all: it changes no result
        asked = (course.spec.train.gradient_checkpointing for course, _ in self._lanes.courses)
        self._network.gradient_checkpointing = any(asked)
        totals = torch.zeros(len(self._lanes), 2, dtype=torch.float64)
        models = self._models()
        with self._timed(len({*models})) as (way, counted):  # not what this rank has to compute, which may be nothing
            self._network.lean = way.beside > 1
            # passes beside each other have the memory of one; one by one, they are to fit into what was left where two had been tried
            sharing = max(way.beside, 2 if self.pace and self.pace.cores > 1 and len(self._lanes) > 1 else 1)
            coming = [
                lane.micro_batches(number, self._rows, self._place, sharing) if models[number] == number else []
                for number, lane in enumerate(self._lanes)
            ]

            def learn(parts: list[Part]) -> None:
                for part, losses in zip(parts, run(self._network, parts, Tensor.backward), strict=True):
                    self._lanes.seated[part.lane].engine.collect()
                    loss = (losses * part.batch.token_weights).sum().item()
                    totals[part.lane] += torch.tensor([loss, part.batch.real_tokens], dtype=torch.float64)
                counted.append((len(parts), sum(part.batch.real_tokens for part in parts)))

            self._pass(coming, learn, way)
        if self._place.workers > 1:
            self._sum_gradients()
            totals = self._place.all_reduce(totals)
        for number, model in enumerate(models):
            if number != model:
                self._lanes.seated[number].engine.take_gradients(self._lanes.seated[model].engine)
        for number in {*models}:
            self.computed.add(int(totals[number, 1]))
        return totals[models].tolist()

    def _models(self) -> list[int]:
        """By lane, the first one that has the same gradient: while none has taken a step, learning rates make no difference."""
        first: dict[object, int] = {}
        return [
            first.setdefault(lane.course.beginning if lane.progress.step == 0 else number, number)
            for number, lane in enumerate(self._lanes)
        ]

    def _pass(
        self, coming: Sequence[Sequence[Callable[[], Part]]], each: Callable[[list[Part]], None], way: Way
    ) -> None:
        """Every lane's micro-batches through the network."""
        for several in apart(joint_passes(coming, self._tokens_at_once // way.beside, way.together)):
            self._teams.run([partial(each, parts) for parts in several], way.beside)

    @contextmanager
    def _timed(self, lanes: int) -> Iterator[tuple[Way, Counted]]:
        """Which way this step's passes go, the same on all ranks, and where they are counted."""
        if self.pace is None or not lanes:
            yield Way(together=lanes), []
            return
        way = Way(*self._place.told(list(self.pace.way(lanes))))
        with self.pace.step(way) as counted:
            yield way, counted

    def _sum_gradients(self) -> None:
        """Over the workers, of all lanes at once."""
        gradients = [gradient for lane in self._lanes for gradient in lane.engine.gradients()]
        if gradients:
            total = self._place.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, total.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _validation_losses(self, lanes: Sequence[Lane]) -> list[float | None]:
        """Mean loss of the labelled tokens of all validation rows under each lane's adapter."""
        rows, place = self._validation_rows, self._place
        if not lanes or rows is None or not len(rows):
            return [None] * len(lanes)
        self._network.eval()
        coming = [lane.validation(number, rows, place, self._network) for number, lane in enumerate(lanes)]
        totals = torch.zeros(len(lanes), 2, dtype=torch.float64)

        @torch.no_grad()
        def judge(parts: list[Part]) -> None:
            for part, losses in zip(parts, run(self._network, parts), strict=True):
                totals[part.lane] += torch.tensor([losses.double().sum().item(), len(losses)], dtype=torch.float64)

        way = Way(len(lanes)) if self.pace is None else Way(*place.told(list(self.pace.fastest(len(lanes)))))
        self._pass(coming, judge, way)
        totals = place.all_reduce(totals)
        return (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()

    def _reports(self, lane: Lane, validation_loss: float | None) -> list[TrialReport]:
        """Of the lane's trials after a step; those that are done leave."""
        if validation_loss is not None and not math.isfinite(validation_loss):
            return self._diverged(
                lane, diverged(lane.progress, f"validation loss {validation_loss}", lane.progress.step)
            )
        reports = []
        for course in list(lane.courses):
            done = lane.progress.step == course.total_steps
            found = validation_loss if course.reports(lane.progress.step) else None
            reports.append(_report(lane, course, "finished" if done else "running", validation_loss=found))
            if done:
                self._finished[course.trial] = Finished(course.tuning, course.total_steps, self.adapter(course.trial))
                self._over.append((course, course.total_steps))
                lane.courses.remove(course)
        return reports

    def _diverged(self, lane: Lane, error: TrainingDiverged) -> list[TrialReport]:
        """The last reports of the lane's trials, which leave."""
        reports = []
        for course in lane.courses:
            own = TrainingDiverged(
                error.message,
                hint="The sweep's other trials go on. If many end like this, lower the upper end of the learning rates, or set "
                "train.warmup and train.max_grad_norm.",
                trial=course.trial,
                **error.context,
            )
            reports.append(_report(lane, course, "diverged", error=own))
        lane.courses = []
        return reports

    def _course(self, trial: str, spec: JobSpec) -> Course:
        return Course(trial, spec, self._rows.lengths, self._auto_tokens, self._place.workers)

    # --- snapshots

    def snapshot(self) -> Snapshot:
        """Everything as it is between two steps, in copies that later steps leave alone."""
        tensors: dict[str, Tensor] = {}
        lanes = []
        for number, held in enumerate([*(lane.held() for lane in self._lanes), *self._lanes.waiting]):
            assert held.state is not None
            for kind, values in held.state.items():
                tensors |= {f"lane/{number}/{kind}/{name}": value for name, value in values.items()}
            trials = {course.trial: course.spec.model_dump(mode="json") for course in held.courses}
            stayed = [course.trial for course in held.stayed]
            lanes.append(
                {"step": held.progress.step, "tokens": held.progress.tokens, "trials": trials, "stayed": stayed}
            )
        finished = {}
        for trial, one in self._finished.items():
            tensors |= {f"finished/{trial}/{name}": value for name, value in one.adapter.items()}
            finished[trial] = {"step": one.step, "tuning": one.tuning.model_dump(mode="json")}
        counted = {"computed": asdict(self.computed), "alone": asdict(self.alone), "auto_tokens": self._auto_tokens}
        if self.pace is not None:
            counted |= {"pace": list(self.pace.seen.items())}
        return Snapshot({**counted, "lanes": lanes, "finished": finished}, tensors)

    def restore(self, directory: Path) -> bool:
        """Go on from a snapshot, in a group that has opened no trial yet; False where there is none. In fp32, on the same
        machine and with as many lanes and workers, what follows is what would have followed, to the last digit."""
        assert not self.steps, "a group is restored before it opens trials"
        found = snapshots.read(directory)
        if found is None:
            return False
        facts, tensors = found.facts, found.tensors
        self.computed, self.alone = Compute(**facts["computed"]), Compute(**facts["alone"])
        self._auto_tokens = facts["auto_tokens"]
        if self.pace is not None:
            self.pace.seen = {Way(*way): list(seen) for way, seen in facts.get("pace", [])}
        held: list[Held] = []
        for number, lane in enumerate(facts["lanes"]):
            courses = [self._course(trial, JobSpec.model_validate(spec)) for trial, spec in lane["trials"].items()]
            state = {kind: _below(tensors, f"lane/{number}/{kind}/") for kind in ("weights", "exp_avg", "exp_avg_sq")}
            progress = Progress(lane["step"], courses[0].total_steps, lane["tokens"])
            held.append(Held(courses, progress, state))
        self._lanes.take_up(held, [lane.get("stayed", []) for lane in facts["lanes"]])
        for trial, one in facts["finished"].items():
            tuning = LoraTuning.model_validate(one["tuning"])
            self._finished[trial] = Finished(tuning, one["step"], _below(tensors, f"finished/{trial}/"))
        return True


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _report(lane: Lane, course: Course, state: TrialState, **more: Any) -> TrialReport:
    progress = lane.progress
    return TrialReport(
        trial=course.trial,
        state=state,
        step=progress.step,
        total_steps=course.total_steps,
        epoch=course.batches.epoch(progress.step),
        loss=progress.loss,
        learning_rate=progress.learning_rate,
        grad_norm=progress.grad_norm,
        tokens=progress.tokens,
        **more,
    )
