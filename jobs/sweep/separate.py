"""The driver of a sweep whose trials train apart from each other, each as a run of its own would."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

from cluster.resources import WorkerShape
from jobs import workers
from jobs.attempt import Attempt
from jobs.sweep import experiment, tuning
from jobs.sweep.broker import Report
from jobs.sweep.groups import SPARED, Groups
from jobs.sweep.placement import Placement
from jobs.sweep.trials import Telling, Trials
from jobs.train.control import Control
from orchestrator.errors import StoreError
from orchestrator.runs.result import RunResult, SweepCompute, SweepResult
from orchestrator.runs.states import RunState, TrialState
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import separate_path, trial_path

log = logging.getLogger(__name__)


def run(ours: Attempt, resolved: ResolvedSpec, shape: WorkerShape, placed: Placement) -> RunResult:
    """One attempt, to its end."""
    sweep, job = resolved.spec.sweep, resolved.spec
    assert sweep is not None
    broker = experiment.new_broker()
    trials = Telling.trials = SeparateTrials(sweep, ours.events, ours.store, ours.run)
    trials.keeps_all = job.tuning.type != "full"
    Telling.broker = broker
    ours.events.emit("phase", phase="training")
    crowned = None
    with Groups(ours, resolved, shape, broker, placed.at_once) as groups, experiment.Watch(ours, trials, broker):
        end = _End(
            ours, groups, broker, tuning.Budget(sweep, seconds=lambda: trials.seconds, tokens=lambda: trials.tokens)
        )
        tuning.Ending.spent = staticmethod(lambda: end.spent)
        with end, end.interrupt.ending():
            done = experiment.tuner(ours, job, broker, placed.at_once).fit()
            trials.made(done._experiment_analysis.trials)  # no callback is called if an attempt before ended them all
        if end.wish is not None:
            state = RunState.PAUSED if end.wish == "pause" else RunState.CANCELLED
            return RunResult(attempt=ours.number, state=state, finished_at=time.time())
        if end.spent:
            trials.end_all(f"the budget of {end.spent} is spent")
        result = trials.result(placed.name, placed.why)
        if trials.best is not None:
            crowned = groups.conclude(trials.best, result.model_dump(mode="json"))
    ours.store.delete(separate_path(ours.run))  # what only trials needed
    if trials.best is None:
        raise experiment.nobody_won(result)
    crowned = crowned or _crowned(ours, resolved, shape, trials.best, result)
    if crowned.state is RunState.SUCCEEDED and not trials.keeps_all:
        trials.forget(trials.best)  # it is published
    return crowned


def _crowned(ours: Attempt, resolved: ResolvedSpec, shape: WorkerShape, best: str, result: SweepResult) -> RunResult:
    """One worker like a trial's checks, evaluates and publishes the winner, where no group is left that could."""
    group = workers.Workers(ours, resolved, replace(shape, workers=1), _crowner, spared=SPARED)
    return group.run(best=best, sweep=result.model_dump(mode="json"))


class SeparateTrials(Trials):
    """Trials that share nothing: what they computed adds up, and what they trained may be as large as the base model."""

    keeps_all = True
    """Whether those that did not win stay in the store."""
    _kept: str | None = None
    """The best so far."""

    @property
    def tokens(self) -> int:
        """Of all trials, as far as they have come."""
        with self._lock:
            return sum(one.last.get("tokens", 0) for one in self._known.values())

    def reported(self, trial: str, report: Report) -> None:
        with self._lock:
            super().reported(trial, report)
            if not self.keeps_all and self._known[trial].state is TrialState.FINISHED:
                for one in filter(None, (trial, self._kept)):
                    if one != self.best:
                        self.forget(one)
                self._kept = self.best

    def forget(self, trial: str) -> None:
        """Remove what a trial has trained."""
        try:
            self._store.delete(trial_path(self._run, trial))
        except StoreError as error:
            log.warning("What trial %s has trained could not be removed: %s", self.name_of(trial), error)

    def _count(self, report: Report) -> None:
        steps, tokens = sum(one.last.get("step", 0) for one in self._known.values()), self.tokens
        began = min((one.began for one in self._known.values() if one.began), default=time.time())
        self.compute = SweepCompute(
            steps=steps,
            tokens=tokens,
            seconds=round(time.time() - began, 2),
            separate_steps=steps,
            separate_tokens=tokens,
        )


class _End:
    """Looks every second whether the sweep is to end before its trials do: groups end first, then Tune, which would kill without a word."""

    def __init__(self, ours: Attempt, groups: Groups, broker: Any, budget: tuning.Budget):
        self._groups, self._budget = groups, budget
        self._control = Control(ours.store, ours.run, ours.number)
        self.interrupt = experiment.Interrupt(broker)
        self.wish: str | None = None
        """`pause` or `cancel`, if a person wants that."""
        self.spent: str | None = None
        """What of the budget is, in words, once no group trains any more."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptory-end", daemon=True)

    def __enter__(self) -> _End:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._control.close()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            if wish := self._control.wish:
                self._groups.wind_down(wish)
                self.wish = wish
                return self.interrupt.set()
            if spent := self._budget.spent:
                self._groups.wind_down("cancel")
                self.spent = spent
                return None
        return None


def _crowner(config: dict[str, Any]) -> dict[str, Any] | None:
    """On the worker that sees to the best."""
    began = time.time()
    workers.give_way(config)
    from jobs.sweep.separate_worker import crowned

    sweep = SweepResult.model_validate(config["sweep"])
    with workers.entered(config, began) as session:
        waited = (
            session.seconds["worker_start"] - sweep.compute.seconds
        )  # this worker was not there while the trials trained
        session.seconds["worker_start"] = round(waited, 2)
        return crowned(session, config["best"], sweep)
