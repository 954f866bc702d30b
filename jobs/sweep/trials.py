"""What is known of a sweep's trials, as Tune and the group tell it: said as events while it happens, summed up at the end."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from jobs.sweep.broker import Report
from jobs.sweep.configs import config_of
from orchestrator.runs.events import Events, read_events
from orchestrator.runs.result import SweepCompute, SweepResult, TrialResult
from orchestrator.runs.states import TrialState
from orchestrator.runs.sweeps import SweepProgress
from orchestrator.spec.search import Config
from orchestrator.spec.sweep import SweepSpec, trial_name
from orchestrator.store import Store, names_path

_BY_SCHEDULER = "stopped by the scheduler"
_SAID = ("step", "total_steps", "epoch", "loss", "validation_loss", "learning_rate", "tokens", "metrics")


@dataclass
class Known:
    """One trial."""

    name: str
    config: Config
    state: TrialState = TrialState.PENDING
    last: Report = field(default_factory=dict)
    message: str = ""
    began: float | None = None
    """Seconds since the epoch."""
    seconds: float | None = None

    def result(self) -> TrialResult:
        named = {"train_loss": self.last.get("loss"), "validation_loss": self.last.get("validation_loss")}
        return TrialResult(
            name=self.name,
            config=self.config,
            state=self.state,
            steps=self.last.get("step", 0),
            tokens=self.last.get("tokens", 0),
            epochs=self.last.get("epoch", 0.0),
            metrics=named | self.last.get("metrics", {}),
            seconds=self.seconds,
            message=self.message,
        )


class Trials:
    """Every trial of a sweep, by Tune's id; their names count them in the order in which Tune made them."""

    def __init__(self, sweep: SweepSpec, events: Events, store: Store, run: str):
        self._sweep, self._events, self._store, self._run = sweep, events, store, run
        self._names: dict[str, str] = store.read_json(names_path(run)) if store.exists(names_path(run)) else {}
        self._known: dict[str, Known] = {}
        self._lock = threading.RLock()
        self._best: tuple[str, tuple[float, float]] | None = None
        self.compute = SweepCompute()
        self._began: float | None = None
        self._before = _seconds_trained(store, run) if sweep.budget and sweep.budget.seconds else 0.0

    def made(self, trials: list[Any]) -> dict[str, int]:
        """All of Tune's trials so far, in order; what an earlier attempt had of them is in their last results.

        Returns:
            Of those that go on from such an attempt, the step up to which its scheduler has decided.
        """
        decided: dict[str, int] = {}
        with self._lock:
            new = [trial for trial in trials if trial.trial_id not in self._known]
            self._name(new)
            for trial in new:
                one = Known(self._names[trial.trial_id], config_of(trial.config))
                self._known[trial.trial_id] = one
                if trial.status == Trial.TERMINATED and "state" in trial.last_result:
                    self.reported(trial.trial_id, trial.last_result)
                    self.ended(trial.trial_id, TrialState.STOPPED, _BY_SCHEDULER)
                else:
                    self._say(one, TrialState.PENDING)
                    if "step" in trial.last_result:
                        decided[trial.trial_id] = trial.last_result["step"]
        return decided

    def _name(self, trials: list[Any]) -> None:
        """Those without a name get the next ones. Tune restores its trials in another order, so they are kept."""
        nameless = [trial.trial_id for trial in trials if trial.trial_id not in self._names]
        if nameless:
            self._names |= {trial: trial_name(n) for n, trial in enumerate(nameless, start=len(self._names) + 1)}
            self._store.write_json(names_path(self._run), self._names)

    def id_of(self, name: str) -> str | None:
        with self._lock:
            return next((trial for trial, one in self._known.items() if one.name == name), None)

    def name_of(self, trial: str) -> str:
        with self._lock:
            return self._known[trial].name if trial in self._known else trial

    def started(self, trial: str) -> None:
        with self._lock:
            one = self._known[trial]
            one.began = one.began or time.time()
            if not one.state.over:
                self._say(one, TrialState.RUNNING)

    @property
    def seconds(self) -> float:
        """Of training, from the first step on, and those of earlier attempts; for budgets."""
        return self._before + (time.monotonic() - self._began if self._began is not None else 0.0)

    def progressed(self, trial: str, report: Report) -> None:
        """For people to watch: what a report says later stands."""
        with self._lock:
            one = self._known.get(trial)
            self._trains(report)
            if one is not None and not one.state.over and report["step"] >= one.last.get("step", 0):
                one.last |= report
                self._say(one, TrialState.RUNNING)

    def reported(self, trial: str, report: Report) -> None:
        with self._lock:
            one = self._known[trial]
            one.last = {**one.last, **{name: value for name, value in report.items() if value is not None}}
            self._trains(report)
            self._count(report)
            self._say(one, TrialState(report["state"]), _words(report))
            value = self._value(one)
            if value is not None and (self._best is None or self._order(one, value) < self._best[1]):
                self._best = trial, self._order(one, value)
                self._events.emit("sweep", best=one.name, metric=value)

    def ended(self, trial: str, state: TrialState, message: str = "") -> None:
        """As it was not told by a report: stopped from outside, or failed."""
        with self._lock:
            one = self._known[trial]
            if not one.state.over:
                self._say(one, state, message)

    def end_all(self, message: str) -> None:
        """Those under way: of a whole experiment's end Tune tells no callback."""
        with self._lock:
            for one in self._known.values():
                if not one.state.over:
                    self._say(one, TrialState.STOPPED, message)

    @property
    def best(self) -> str | None:
        """Id of the best trial among those that came to their end."""
        return self._best[0] if self._best else None

    def result(self, placement: str, why: str) -> SweepResult:
        return SweepResult(
            trials=[one.result() for one in sorted(self._known.values(), key=lambda one: (len(one.name), one.name))],
            best=self._known[self.best].name if self.best else None,
            metric=self._sweep.metric,
            mode=self._sweep.better,
            placement=placement,
            why=why,
            compute=self.compute,
        )

    def _trains(self, report: Report) -> None:
        if self._began is None and report.get("step"):
            self._began = time.monotonic()

    def _count(self, report: Report) -> None:
        """What the sweep has computed, by the newest report."""
        compute = SweepCompute(**report.get("compute", {}))
        if compute.tokens >= self.compute.tokens:  # reports of an earlier attempt come again
            self.compute = compute

    def _value(self, one: Known) -> float | None:
        """Of one that took its whole course: what was stopped at a high learning rate would have come further down."""
        if one.state is not TrialState.FINISHED:
            return None
        values = {"validation_loss": one.last.get("validation_loss"), **one.last.get("metrics", {})}
        return values.get(self._sweep.metric)

    def _order(self, one: Known, value: float) -> tuple[float, float]:
        """The best first; of those with one share of right answers, the one with the lowest loss."""
        loss = one.last.get("validation_loss")
        return value if self._sweep.better == "min" else -value, math.inf if loss is None else loss

    def _say(self, one: Known, state: TrialState, message: str = "") -> None:
        one.state, one.message = state, message or one.message
        if state.over and one.began is not None:
            one.seconds = round(time.time() - one.began, 2)
        said = {name: one.last[name] for name in _SAID if one.last.get(name) is not None}
        self._events.emit("trial", one.message, trial=one.name, config=one.config, state=state.value, **said)


class Telling(tune.Callback):
    """Tune's callback. It is pickled with the experiment, so it holds nothing: what it tells is this process's."""

    trials: Trials
    broker: Any

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._made(trials)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._made(trials)
        Telling.trials.started(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "step" in result:  # or it was dismissed before Tune had ended
            Telling.trials.reported(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        Telling.broker.release.remote(trial.trial_id)
        Telling.trials.ended(trial.trial_id, TrialState.STOPPED, _BY_SCHEDULER)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        Telling.broker.release.remote(trial.trial_id)
        Telling.trials.ended(trial.trial_id, TrialState.FAILED, _last_line(trial))

    def _made(self, trials: list[Any]) -> None:
        if decided := Telling.trials.made(trials):
            Telling.broker.decided.remote(decided)


def _seconds_trained(store: Store, run: str) -> float:
    """In earlier attempts."""
    progress = SweepProgress()
    for event in read_events(store, run):
        progress.take(event)
    return progress.seconds_trained


def _words(report: Report) -> str:
    error = report.get("error")
    return error["message"] if error else report.get("message", "")


def _last_line(trial: Any) -> str:
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1] if lines else "its process died"
