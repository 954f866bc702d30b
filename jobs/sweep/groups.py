"""The groups of workers of trials that train apart from each other: one for each trial, and as many at once as are placed.

Each runs on a thread of the sweep's driver, to which Ray Train's controllers belong. Made by the trials' own processes, they would
leave their reservation behind when such a process is killed: Ray frees it when both its controller and its job have ended.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray

from cluster.resources import WorkerShape
from jobs import workers
from jobs.attempt import Attempt
from jobs.sweep import history
from jobs.sweep.broker import Config, Orders
from jobs.sweep.trials import Trials
from orchestrator.errors import AdaptoryError, StoreError, Superseded, TrainingDiverged
from orchestrator.runs.states import RunState, TrialState
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import checkpoints_path, trial_run

log = logging.getLogger(__name__)

SPARED = 0.1
"""CPUs of each worker that it does not reserve, though it uses them: the trials' processes want some on paper."""
ORDERS_SECONDS = 1.0
"""That one question to the broker waits for something to do."""
WIND_DOWN_SECONDS = 180.0
"""That groups have for the step in hand and a checkpoint; what is left of them ends with the job."""


class Groups:
    """
    Args:
        at_once: most groups at the same time; other trials wait.
    """

    def __init__(
        self, ours: Attempt, resolved: ResolvedSpec, shape: WorkerShape, broker: Any, trials: Trials, at_once: int
    ):
        self._ours, self._resolved, self._shape, self._broker = ours, resolved, shape, broker
        self._trials, self._at_once = trials, at_once
        self._waiting: dict[str, Config] = {}
        self._running: dict[str, threading.Thread] = {}
        self._starts = 0
        self._lock, self._over = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptory-groups", daemon=True)

    def __enter__(self) -> Groups:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wind_down("cancel")

    def wind_down(self, wish: str) -> None:
        """Have all groups end, and wait until they have.

        Args:
            wish: `pause`, of which a checkpoint comes, or `cancel`.
        """
        with self._lock:
            self._over.set()
            running = list(self._running.values())
        ray.get(self._broker.wind_down.remote(wish))
        deadline = time.monotonic() + WIND_DOWN_SECONDS
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                orders: Orders = ray.get(self._broker.sync.remote({}, None, ORDERS_SECONDS))
            except ray.exceptions.RayError as error:  # it is being started again
                log.warning("%s", error)
                self._over.wait(1.0)
                continue
            with self._lock:
                for trial in orders.close:
                    self._waiting.pop(trial, None)
                self._waiting |= orders.open
                self._seat()

    def _seat(self) -> None:
        """Begin with those that have waited longest."""
        for trial in [trial for trial in self._waiting if trial not in self._running]:
            if len(self._running) >= self._at_once or self._over.is_set():
                return
            self._starts += 1
            part = f"{self._trials.name_of(trial)}-{self._starts}"
            work = trial, self._waiting.pop(trial), part
            thread = threading.Thread(target=self._attend, args=work, name=f"adaptory-{part}", daemon=True)
            self._running[trial] = thread
            thread.start()

    def _attend(self, trial: str, config: Config, part: str) -> None:
        """One group from its start to its end, whatever that is."""
        state: RunState | None = None
        try:
            state = self._train(trial, config, part)
        except TrainingDiverged as error:
            self._end(trial, TrialState.DIVERGED, error.message)
        except Superseded as error:
            log.warning("%s", error)
        except AdaptoryError as error:
            self._end(trial, TrialState.FAILED, str(error))
        except Exception as error:
            log.exception("the group of trial %s failed", trial)
            self._end(trial, TrialState.FAILED, f"{type(error).__name__}: {error}")
        goes_on = self._over.is_set() or self._left(trial)
        with self._lock:
            del self._running[trial]
            self._seat()
        if state is RunState.SUCCEEDED or not goes_on:
            self._forget_checkpoints(trial)

    def _train(self, trial: str, config: Config, part: str) -> RunState:
        """
        Args:
            part: what this group is called.
        """
        if reports := history.read(self._ours.store, self._ours.run, trial):
            ray.get(self._broker.tell.remote(trial, reports))
            if reports[-1]["state"] != TrialState.RUNNING:
                return RunState.SUCCEEDED  # in an attempt whose last words Tune did not keep
        group = workers.Workers(self._ours, self._resolved, self._shape, _worker, spared=SPARED, part=part)
        name = self._trials.name_of(trial)
        return group.run(broker=self._broker, trial=trial, name=name, config=config).state

    def _end(self, trial: str, state: TrialState, message: str) -> None:
        log.warning("%s %s: %s", self._trials.name_of(trial), state.value, message)
        ray.get(self._broker.end.remote(trial, state.value, message))

    def _left(self, trial: str) -> bool:
        """Whether the trial goes on without its group, in another one."""
        try:
            return ray.get(self._broker.left.remote(trial))
        except ray.exceptions.RayError as error:
            log.warning("%s", error)
            return True

    def _forget_checkpoints(self, trial: str) -> None:
        try:
            self._ours.store.delete(checkpoints_path(trial_run(self._ours.run, trial)))
        except StoreError as error:  # they go with the sweep's end
            log.warning("%s", error)


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """On each worker of a trial."""
    began = time.time()
    workers.give_way(config)
    from jobs.sweep.separate_worker import run_trial

    with workers.entered(config, began) as session:
        result = run_trial(session, config["broker"], config["trial"], config["name"], config["config"])
    return result.model_dump(mode="json")
