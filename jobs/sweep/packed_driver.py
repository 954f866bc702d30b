"""The driver of a packed sweep: one group of workers computes all trials."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import ray

from cluster.resources import WorkerShape
from jobs import workers
from jobs.attempt import Attempt
from jobs.sweep import experiment, tuning
from jobs.sweep.trials import Telling, Trials
from orchestrator.errors import AdaptoryError, JobFailed, TrialRunsAlone
from orchestrator.runs.result import RunResult
from orchestrator.spec.resolved import ResolvedSpec

log = logging.getLogger(__name__)

SPARED = 0.5
"""CPUs of each worker that it does not reserve, though it uses them: the trials' processes want some on paper."""
AT_ONCE = 16
"""Trials that Tune has under way: a process each, of 180 MB and a second and a half to start. Which of them are computed at once
is the group's affair."""

WORKER_SECONDS = 20.0
"""That the trials' processes are held back for the workers'. Ray starts as many at once as there are cores: behind all trials' a worker
would wait for half a minute, and load its libraries when they have theirs."""

SAID_AGAIN_SECONDS = 10.0


def run(ours: Attempt, resolved: ResolvedSpec, shape: WorkerShape) -> RunResult:
    """One attempt, to its end."""
    sweep = resolved.spec.sweep
    assert sweep is not None
    goes_on = experiment.has_state(ours)  # then nobody knows how many trials come
    broker = experiment.new_broker(0 if goes_on else min(AT_ONCE, tuning.expected(resolved.spec)))
    trials = Telling.trials = Trials(sweep, ours.events, ours.store, ours.run)
    Telling.broker = broker
    ours.events.emit("phase", phase="waiting for workers")
    with (
        _Group(workers.Workers(ours, resolved, shape, _worker, spared=SPARED), broker) as group,
        experiment.Watch(ours, trials, broker),
    ):
        budget = tuning.Budget(sweep, seconds=lambda: trials.seconds, tokens=lambda: trials.compute.tokens)
        tuning.Ending.spent = staticmethod(lambda: budget.spent)
        group.await_worker()
        with group.ended.ending():
            tuner = experiment.tuner(ours, resolved.spec, broker, AT_ONCE)
            if group.ended.is_set:
                return group.join()
            done = tuner.fit()
            trials.made(done._experiment_analysis.trials)  # no callback is called if an attempt before ended them all
        if group.ended.is_set:  # before the trials did: paused, cancelled, or it failed
            return group.join()
        if spent := budget.spent:
            trials.end_all(f"the budget of {spent} is spent")
        result = trials.result("packed", "")
        if trials.best is None:
            return group.finish(None, None, experiment.nobody_won(result).to_dict())
        return group.finish(trials.best, result.model_dump(mode="json"))


def why_alone(result: RunResult) -> str | None:
    """Why the trials cannot share the network, if that is what the group has found out."""
    error = result.error or {}
    return error["message"] if error.get("code") == TrialRunsAlone.code else None


class _Group:
    """The workers, on a thread: Tune has the main one, where it can be interrupted when they end before it does."""

    def __init__(self, group: workers.Workers, broker: Any):
        self._group, self._broker = group, broker
        self.ended = experiment.Interrupt(broker)
        self._result: RunResult | None = None
        self._error: AdaptoryError | None = None
        self._thread = threading.Thread(target=self._run, name="adaptory-group", daemon=True)

    def __enter__(self) -> _Group:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, *more: object) -> None:
        """Whatever went wrong here, the workers are told to end."""
        if error is not None and not isinstance(error, AdaptoryError):
            log.error("the sweep failed", exc_info=error)
            error = JobFailed(f"The sweep failed: {type(error).__name__}: {error}")
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._broker.finish.remote(None, None, error.to_dict() if error else None))
        self._thread.join()

    def await_worker(self) -> None:
        """Until a worker's process is there: for `WORKER_SECONDS` at most, since its CPUs may be taken."""
        deadline = time.monotonic() + WORKER_SECONDS
        with contextlib.suppress(ray.exceptions.RayError):
            while self._thread.is_alive() and time.monotonic() < deadline:
                if ray.get(self._broker.worker.remote(patience=1.0)):
                    return

    def finish(self, *end: Any) -> RunResult:
        """Tell the workers that no trial will come any more, until they have heard it: a broker that is killed forgets it, and one that
        starts again takes a while. Where Ray itself is gone, so is the group, and with what error it says.

        Args:
            end: for `Broker.finish`.
        """
        while self._thread.is_alive():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._broker.finish.remote(*end))
            self._thread.join(SAID_AGAIN_SECONDS)
        return self.join()

    def join(self) -> RunResult:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._group.run(broker=self._broker)
        except AdaptoryError as error:
            self._error = error
        except Exception as error:
            log.exception("the group failed")
            self._error = JobFailed(f"The workers failed: {type(error).__name__}: {error}")
        finally:
            self.ended.set()


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """On each worker; what it returns is a result that the store did not take."""
    began = time.time()
    config["broker"].coming.remote()
    from jobs.sweep.worker import run_sweep

    workers.give_way(config)  # not before its imports: the trials' processes, which start meanwhile, would starve them
    with workers.entered(config, began) as session:
        result = run_sweep(session, config["broker"])
    if result is not None and why_alone(result):
        return result.model_dump(mode="json")  # not the run's last word: its driver goes on
    return workers.handed_in(session, result)
