"""Where a sweep is, put together from its events; and the trials that a person has ended.

Events may come twice, late and in any order: each figure is the newest that was said of it, so the same events give the same
state whatever their order. Torch-free and without the database, so that a job may use it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from pydantic import ValidationError

from orchestrator.errors import ObjectMissing
from orchestrator.runs.events import Event
from orchestrator.runs.result import SweepResult
from orchestrator.runs.run import Run
from orchestrator.runs.states import TrialState
from orchestrator.spec.sweep import SweepSpec, by_field, trial_name
from orchestrator.store import Store, stop_trials_path

Order = tuple[int, float, int]
"""When something was said: attempt, seconds since the epoch, the writer's own count."""

_ID = re.compile(r"a(\d+)-.*?(\d+)$")


@dataclass
class _Newest:
    """Remembers when each thing was last said."""

    _said: dict[str, Order] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def _newer(self, name: str, order: Order) -> bool:
        """Whether nothing newer was said of this before; it is noted."""
        if order < self._said.get(name, order):
            return False
        self._said[name] = order
        return True


@dataclass
class Trial(_Newest):
    """One configuration, as far as it has come."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    """Full name of a field → value."""
    state: TrialState = TrialState.PENDING
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    """Of its last step."""
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """What `evaluate` measured of it."""
    message: str = ""
    seconds: float | None = None
    began_at: float | None = None
    ended_at: float | None = None
    """Times are seconds since the epoch."""
    losses: dict[int, float] = field(default_factory=dict)
    validation_losses: dict[int, float] = field(default_factory=dict)
    """By optimiser step. A step that is reported again after a resume counts as it was reported last."""

    def value(self, metric: str) -> float | None:
        """Its present figure for the metric; of one that diverged, none."""
        if self.state is TrialState.DIVERGED:
            return None
        return self.validation_loss if metric == "validation_loss" else self.metrics.get(metric)

    def take(self, event: Event, order: Order) -> None:
        data = event.data
        if (state := _state(data.get("state"))) is not None and self._newer("state", order):
            self.state = state
            self.ended_at = event.created_at if state.over else None
            self.message = str(data.get("message") or event.message)
        if data.get("state") == TrialState.RUNNING:
            self.began_at = min(self.began_at or event.created_at, event.created_at)
        if isinstance(config := data.get("config"), dict) and self._newer("config", order):
            self.config = by_field({str(name): value for name, value in config.items()})
        if isinstance(metrics := data.get("metrics"), dict):
            for name, value in metrics.items():
                if _is_number(value) and self._newer(f"metrics.{name}", order):
                    self.metrics[name] = float(value)
        for name in ("step", "total_steps", "epoch", "loss", "validation_loss", "learning_rate", "tokens", "seconds"):
            if _is_number(data.get(name)) and self._newer(name, order):
                setattr(self, name, data[name])
        if _is_number(step := data.get("step")):
            for name, points in (("loss", self.losses), ("validation_loss", self.validation_losses)):
                if _is_number(data.get(name)) and self._newer(f"{name}@{step}", order):
                    points[int(step)] = float(data[name])


@dataclass
class SweepProgress(_Newest):
    """Where a sweep is."""

    expected: int | None = None
    """Trials that it has in all, if no budget ends it; None: not known."""
    metric: str = "validation_loss"
    mode: Literal["min", "max"] = "min"
    named: dict[str, Trial] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """`placement`, `why`, and whatever else the job says of it."""
    compute: dict[str, Any] = field(default_factory=dict)
    settled: bool = False
    """Whether the run is over or paused, so that what still runs by its events does not."""

    _best: str | None = None
    _left: tuple[float, float] | None = None
    _spans: dict[int, tuple[float, float]] = field(default_factory=dict, repr=False)
    """Of each attempt: when a trial was first told of, and when last; beside it, a trial that had taken a step."""
    _trained: dict[int, tuple[float, float]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, run: Run, events: Iterable[Event] = ()) -> SweepProgress:
        """Of a run, with what its result says where it has ended."""
        progress = cls()
        try:
            spec = SweepSpec.model_validate(run.spec.get("sweep"))
        except ValidationError:  # of another version; its events can be read all the same
            given = run.spec.get("sweep") or {}
            progress.metric = str(given.get("metric") or progress.metric)
            progress.mode = "min" if progress.metric == "validation_loss" else "max"
        else:
            progress.expected, progress.metric, progress.mode = spec.count, spec.metric, spec.better
        for event in events:
            progress.take(event)
        if run.result is not None and run.result.sweep is not None:
            progress.conclude(run.result.sweep)
        progress.settled = run.settled
        return progress

    @property
    def trials(self) -> list[Trial]:
        """All that were announced, in the order of their numbers."""
        return [self.named[name] for name in sorted(self.named, key=_by_number)]

    def names(self) -> list[str]:
        """Of all its trials, those that were not announced yet among them."""
        return sorted(
            {trial_name(number + 1) for number in range(self.expected or 0)} | self.named.keys(), key=_by_number
        )

    def take(self, event: Event) -> Trial | None:
        """Take over what an event says; the trial that it is about, if it is about one."""
        order = _order(event)
        if event.type == "trial" and isinstance(name := event.data.get("trial"), str):
            trial = self.named.setdefault(name, Trial(name))
            trial.take(event, order)
            _widen(self._spans, order[0], event.created_at)
            if event.data.get("step"):
                _widen(self._trained, order[0], event.created_at)
            return trial
        if event.type == "sweep":
            self._take_sweep(event, order)
        return None

    def conclude(self, result: SweepResult) -> None:
        """Lay the result over what events said: it is the last word."""
        self.metric, self.mode, self._best = result.metric, result.mode, result.best
        self.plan = {**self.plan, "placement": result.placement, "why": result.why}
        self.compute = result.compute.model_dump(mode="json")
        for one in result.trials:
            trial = self.named.setdefault(one.name, Trial(one.name))
            trial.config = by_field(one.config)
            trial.state, trial.step, trial.epoch, trial.message = one.state, one.steps, one.epochs, one.message
            trial.seconds = one.seconds if one.seconds is not None else trial.seconds
            metrics = dict(one.metrics)
            trial.validation_loss = metrics.pop("validation_loss", trial.validation_loss)
            trial.loss = metrics.pop("train_loss", trial.loss)
            trial.metrics.update(metrics)

    # what follows from it

    def ranked(self) -> list[Trial]:
        """Trials that have the metric, the best first; where they are equal, those that ended whole before those that did not, and the
        lowest validation loss first."""
        with_value = [(trial.value(self.metric), trial) for trial in self.trials]
        sign = 1 if self.mode == "min" else -1
        found = [
            (sign * value, trial.state is not TrialState.FINISHED, _loss(trial), trial)
            for value, trial in with_value
            if value is not None
        ]
        return [trial for *_, trial in sorted(found, key=lambda item: item[:3])]

    @property
    def best(self) -> Trial | None:
        """As the job says; before it has, the best by the metric of those that came to their end or still may, else of all."""
        if self._best is not None and self._best in self.named:
            return self.named[self._best]
        ranked = self.ranked()
        win = [one for one in ranked if one.state is TrialState.FINISHED or not (one.state.over or self.settled)]
        return next(iter(win or ranked), None)

    def counts(self) -> dict[TrialState, int]:
        """How many trials are in each state, those that were not announced yet among the pending."""
        counts = {state: sum(trial.state is state for trial in self.named.values()) for state in TrialState}
        counts[TrialState.PENDING] += max(0, (self.expected or 0) - len(self.named))
        return {state: count for state, count in counts.items() if count}

    def seconds_left(self, now: float) -> float | None:
        """As the job says, else by the steps that are left at the speed so far; None while nothing is known.

        Args:
            now: seconds since the epoch, by the clock of whoever looks.
        """
        if self._left is not None:
            seconds, said_at = self._left
            return max(0.0, seconds - (now - said_at))
        steps = [trial.step for trial in self.named.values() if trial.state.over and trial.step]
        steps += [trial.total_steps for trial in self.named.values() if not trial.state.over and trial.total_steps]
        done = sum(trial.step for trial in self.named.values())
        elapsed = self._elapsed(now)
        if not steps or not done or elapsed <= 0:
            return None
        usual = sum(steps) / len(steps)
        running = [trial for trial in self.named.values() if trial.state is TrialState.RUNNING]
        left = sum(max(0, (trial.total_steps or usual) - trial.step) for trial in running)
        left += usual * self.counts().get(TrialState.PENDING, 0)
        return left * elapsed / done

    @property
    def seconds_trained(self) -> float:
        """From each attempt's first step to its last."""
        return sum(last - first for first, last in self._trained.values())

    def _elapsed(self, now: float) -> float:
        """Seconds in which trials ran; what lay between attempts does not count."""
        if not self._spans:
            return 0.0
        first, last = self._spans[max(self._spans)]
        present = max(last, now) - first if not self.settled else last - first
        return present + sum(
            last - first for number, (first, last) in self._spans.items() if number != max(self._spans)
        )

    def _take_sweep(self, event: Event, order: Order) -> None:
        data = event.data
        if "plan" in data and self._newer("plan", order):
            plan = data["plan"]
            self.plan = dict(plan) if isinstance(plan, Mapping) else {"why": str(plan)}
        if isinstance(data.get("compute"), dict) and self._newer("compute", order):
            self.compute = dict(data["compute"])
        if isinstance(data.get("best"), str) and self._newer("best", order):
            self._best = data["best"]
        if _is_number(data.get("seconds_left")) and self._newer("left", order):
            self._left = (float(data["seconds_left"]), event.created_at)


def _widen(spans: dict[int, tuple[float, float]], attempt: int, at: float) -> None:
    first, last = spans.get(attempt, (at, at))
    spans[attempt] = min(first, at), max(last, at)


def _order(event: Event) -> Order:
    found = _ID.match(event.id)
    return (int(found[1]), event.created_at, int(found[2])) if found else (0, event.created_at, 0)


def _state(word: Any) -> TrialState | None:
    try:
        return TrialState(word)
    except ValueError:  # of a later version
        return None


def _loss(trial: Trial) -> float:
    return math.inf if trial.validation_loss is None else trial.validation_loss


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_number(name: str) -> list[tuple[int, str]]:
    """`t9` before `t10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# --- ending single trials -------------------------------------------------------------------------------------------


def trials_to_stop(store: Store, run: str) -> frozenset[str]:
    """Names of the trials that a person has ended. A job looks every second or so, as it does for `pause`.

    Raises:
        StoreError: the store does not answer now.
    """
    try:
        return frozenset(store.read_json(stop_trials_path(run)).get("stop_trials", ()))
    except ObjectMissing:
        return frozenset()


def ask_to_stop(store: Store, run: str, trial: str) -> bool:
    """Put a trial among those that a person has ended; whether it was not there before. Of several processes only one may do this at a
    time: `submission.stop_trial` sees to it."""
    before = trials_to_stop(store, run)
    if trial in before:
        return False
    store.write_json(stop_trials_path(run), {"stop_trials": sorted(before | {trial})})
    return True
