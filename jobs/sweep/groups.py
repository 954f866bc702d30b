"""The groups of workers of trials that train apart from each other: as many as are placed at once, each with one trial at a time.

Each runs on a thread of the sweep's driver, to which Ray Train's controllers belong. Made by the trials' own processes, they would
leave their reservation behind when such a process is killed: Ray frees it when both its controller and its job have ended. A group
whose worker needs no other stays for the next trial: to start one, with its controller, is twelve seconds of a core's work.
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
from jobs.sweep.broker import Orders
from jobs.train.group import EndOnLastingErrors, failed
from orchestrator.errors import AdaptoryError, Superseded
from orchestrator.runs.result import RunResult
from orchestrator.runs.states import TrialState
from orchestrator.spec.resolved import ResolvedSpec

log = logging.getLogger(__name__)

SPARED = 0.1
"""CPUs of each worker that it does not reserve, though it uses them: the trials' processes want some on paper."""
ORDERS_SECONDS = 1.0
"""That one question to the broker waits for a trial."""
LOOK_SECONDS = 0.2
"""Between looks at whether the winner has been seen to."""
WIND_DOWN_SECONDS = 180.0
"""That groups have for the step in hand and a checkpoint; what is left of them ends with the job."""


class Groups:
    """
    Args:
        at_once: most groups at the same time; other trials wait.
    """

    def __init__(self, ours: Attempt, resolved: ResolvedSpec, shape: WorkerShape, broker: Any, at_once: int):
        self._ours, self._resolved, self._shape, self._broker = ours, resolved, shape, broker
        self._at_once = at_once
        self._running: dict[str, threading.Thread] = {}
        self._results: dict[str, RunResult] = {}
        self._starts = 0
        self._lock, self._over, self._room = threading.Lock(), threading.Event(), threading.Event()
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
        running = self._last()
        ray.get(self._broker.wind_down.remote(wish))
        deadline = time.monotonic() + WIND_DOWN_SECONDS
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))

    def conclude(self, best: str, sweep: dict[str, Any]) -> RunResult | None:
        """All trials have ended: have a group that is still there see to the winner, and wait for what comes of it.

        Args:
            best: id of the winner.
            sweep: a `SweepResult`.

        Returns:
            None: there is no such group.
        """
        self._last()
        deadline = time.monotonic() + WIND_DOWN_SECONDS
        try:
            ray.get(self._broker.finish.remote(best, sweep))
            while self._running:
                crowner = ray.get(self._broker.crowner.remote())
                if crowner is not None and crowner not in self._running:
                    break
                if crowner is None and time.monotonic() > deadline:
                    break
                time.sleep(LOOK_SECONDS)
            return self._results.get(ray.get(self._broker.crowner.remote()) or "")
        except ray.exceptions.RayError as error:  # the broker was killed, and what it was told is lost
            log.warning("%s", error)
            return None

    def _last(self) -> list[threading.Thread]:
        """Those that run, after which none is started."""
        with self._lock:
            self._over.set()
            return list(self._running.values())

    def _run(self) -> None:
        while not self._over.is_set():
            if len(self._running) >= self._at_once:
                self._room.wait(ORDERS_SECONDS)
                self._room.clear()
                continue
            group = f"g{self._starts + 1}"
            try:
                orders: Orders = ray.get(self._broker.assign.remote(group, ORDERS_SECONDS, to_start=True))
            except ray.exceptions.RayError as error:  # it is being started again
                log.warning("%s", error)
                self._over.wait(1.0)
                continue
            if orders.open:
                self._start(group)

    def _start(self, group: str) -> None:
        with self._lock:
            if not self._over.is_set():
                self._starts += 1
                self._running[group] = threading.Thread(
                    target=self._attend, args=[group], name=f"adaptory-{group}", daemon=True
                )
                self._running[group].start()

    def _attend(self, group: str) -> None:
        """One group from its start to its end, whatever that is."""
        end: tuple[str, str] | tuple[()] = ()
        most = self._resolved.spec.resources.max_failures
        work = workers.Workers(
            self._ours,
            self._resolved,
            self._shape,
            _worker,
            spared=SPARED,
            part=group,
            ends=_EndWithTrial(self._broker, group, most),
        )
        try:
            self._results[group] = work.run(broker=self._broker, group=group)
        except Superseded as error:
            log.warning("%s", error)
        except AdaptoryError as error:
            end = history.ended_by(error)
        except Exception as error:
            log.exception("the group %s failed", group)
            end = TrialState.FAILED.value, f"{type(error).__name__}: {error}"
        self._left(group, *end)
        with self._lock:
            del self._running[group]
            self._room.set()

    def _left(self, group: str, *end: str) -> None:
        if end:
            log.warning("%s: its trial %s: %s", group, *end)
        try:
            if trial := ray.get(self._broker.left.remote(group, *end)):
                history.forget_checkpoints(self._ours.store, self._ours.run, trial)
        except ray.exceptions.RayError as error:  # it is being started again, and knows of no group then
            log.warning("%s", error)


class _EndWithTrial(EndOnLastingErrors):
    """Ends a group when its workers have failed too often over one trial. Ray Train's own count is over all that the group has had.

    Args:
        most: failures that one trial may have.
    """

    def __init__(self, broker: Any, group: str, most: int):
        self._broker, self._group, self._most = broker, group, most

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        super().after_exception(run_context, worker_exceptions)
        if (times := ray.get(self._broker.failed.remote(self._group))) > self._most:
            raise failed(list(worker_exceptions.values()), f"The workers failed {times} times")


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """On each worker of a group."""
    began = time.time()
    workers.give_way(config)
    from jobs.sweep.separate_worker import run_trials

    with workers.entered(config, began) as session:
        return run_trials(session, config["broker"], config["group"])
