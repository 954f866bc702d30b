"""A sweep's entry point: `python -m jobs.sweep --store URL --run ID --attempt N`. Ray Tune decides, and a group of workers computes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune

from jobs import attempt, workers
from jobs.attempt import Attempt
from jobs.sweep import tuning
from jobs.sweep.broker import Broker
from jobs.sweep.trial import CPUS, ThinTrial
from jobs.sweep.trials import Telling, Trials
from orchestrator.errors import AdaptoryError, JobFailed, StoreError, TrainingDiverged
from orchestrator.runs.result import RunResult, SweepResult
from orchestrator.runs.states import TrialState
from orchestrator.runs.sweeps import trials_to_stop
from orchestrator.spec.job import JobSpec
from orchestrator.store import names_path, train_storage_path

log = logging.getLogger(__name__)

SPARED = 0.5
"""CPUs of each worker that it does not reserve, though it uses them: the trials' processes want some on paper."""
EXPERIMENT = "tune"
"""Directory of Tune's own state, beside Train's."""
AT_ONCE = 16
"""Trials that Tune has under way: a process each, of 180 MB and a second and a half to start. Which of them are computed at once
is the group's affair."""
RESTARTS = 3
"""Of a trial's process that dies; its course goes on meanwhile."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when the attempt ended as it should (paused included), 1 when it failed; the result says why."""
    return attempt.main("python -m jobs.sweep", _run, arguments)


def _run(ours: Attempt) -> RunResult:
    resolved = ours.resolved()
    sweep = resolved.spec.sweep
    assert sweep is not None
    tuning.quiet()
    ours.events.emit("state", "The job has started.", state="running")
    shape = workers.connect(ours, resolved)
    broker: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Broker).remote()
    trials = Telling.trials = Trials(sweep, ours.events, ours.store, ours.run)
    Telling.broker = broker
    with (
        _Group(workers.Workers(ours, resolved, shape, _worker, spared=SPARED), broker) as group,
        _Watch(ours, trials, broker),
    ):
        budget = tuning.Budget(sweep, tokens=lambda: trials.compute.tokens)
        tuning.Ending.spent = staticmethod(lambda: budget.spent)
        with group.interrupting():
            tuner = _tuner(ours, resolved.spec, broker)
            if group.ended.is_set():
                return group.join()
            done = tuner.fit()
            trials.made(done._experiment_analysis.trials)  # no callback is called if an attempt before ended them all
        if group.ended.is_set():  # before the trials did: paused, cancelled, or it failed
            return group.join()
        if spent := budget.spent:
            trials.end_all(f"the budget of {spent} is spent")
        if trials.best is None:
            ray.get(broker.finish.remote(None, None, _nobody_won(trials.result("packed", "")).to_dict()))
        else:
            ray.get(broker.finish.remote(trials.best, trials.result("packed", "").model_dump(mode="json")))
        return group.join()


def _tuner(ours: Attempt, job: JobSpec, broker: Any) -> tune.Tuner:
    """A new experiment, or the one that an earlier attempt left: what has ended there stays as it is, and the rest goes on."""
    path, filesystem = workers.train_storage(ours.store, ours.run)
    trainable = tune.with_resources(tune.with_parameters(ThinTrial, broker=broker), {"cpu": CPUS})
    found = f"{path}/{EXPERIMENT}"
    if _has_state(ours):
        return tune.Tuner.restore(found, trainable, resume_errored=True, storage_filesystem=filesystem)
    sweep = job.sweep
    assert sweep is not None
    space, searcher, samples = tuning.search(job, AT_ONCE)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=tuning.scheduler(sweep, tuning.longest(job)),
            num_samples=samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the group keeps what there is to keep
            stop=tuning.Ending(),
            callbacks=[Telling()],
            verbose=0,
        ),
    )


def _has_state(ours: Attempt) -> bool:
    """Whether an attempt before this one left trials to go on with; what was cut off before there were any is removed."""
    folder = f"{train_storage_path(ours.run)}/{EXPERIMENT}"
    if any(name.startswith("experiment_state-") for name in ours.store.children(folder)):
        return True
    ours.store.delete(folder)
    ours.store.delete(names_path(ours.run))
    return False


def _nobody_won(result: SweepResult) -> AdaptoryError:
    """What a person can do when no trial came to its end with the metric."""
    rates = sorted({rate for one in result.trials if (rate := one.config.get("train.learning_rate"))})
    if rates and all(one.state is TrialState.DIVERGED for one in result.trials):
        return TrainingDiverged(
            f"All {len(result.trials)} trials diverged, at learning rates from {rates[0]:.3g} to {rates[-1]:.3g}.",
            hint=f"Search lower ones: sweep.search.learning_rate from {rates[0] / 100:.1e} to {rates[0] / 3:.1e}, say.",
            learning_rates=rates,
        )
    finished = [one for one in result.trials if one.state is TrialState.FINISHED]
    if finished:
        return JobFailed(
            f"Of the {len(finished)} trials that came to their end, none has {result.metric}; of {finished[0].name}: "
            f"{finished[0].message or 'nothing was measured'}.",
            hint="`adaptory runs logs` says more. Start the sweep anew with a lower evaluate.max_new_tokens, or by the validation loss.",
        )
    counted = Counter(one.state.value for one in result.trials)
    return JobFailed(
        f"No trial came to its end: {', '.join(f'{n} {state}' for state, n in counted.items())}.",
        hint="Give the sweep a larger budget, or see `adaptory sweep show` for why each of them ended.",
    )


class _Group:
    """The workers, on a thread: Tune has the main one, where it can be interrupted when they end before it does."""

    def __init__(self, group: workers.Workers, broker: Any):
        self._group, self._broker = group, broker
        self.ended = threading.Event()
        self._interrupts = False
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

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """The block is ended when the workers end: Tune keeps its state at Ctrl-C, and can be resumed from it."""
        self._interrupts = True
        try:
            yield
        except KeyboardInterrupt:  # Tune does not listen yet
            if not self.ended.is_set():
                raise
        finally:
            self._interrupts = False

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
            if self._interrupts:
                os.kill(os.getpid(), signal.SIGINT)


class _Watch:
    """Looks every second where trials are, and which of them a person has ended (`adaptory sweep stop-trial`)."""

    def __init__(self, ours: Attempt, trials: Trials, broker: Any):
        self._ours, self._trials, self._broker = ours, trials, broker
        self._over, self._done = threading.Event(), set[str]()
        self._thread = threading.Thread(target=self._run, name="adaptory-watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            try:
                self._look()
            except (StoreError, ray.exceptions.RayError) as error:  # away for a moment
                log.warning("%s", error)

    def _look(self) -> None:
        for trial, report in ray.get(self._broker.progress.remote()).items():
            self._trials.progressed(trial, report)
        for name in trials_to_stop(self._ours.store, self._ours.run) - self._done:
            trial = self._trials.id_of(name)
            if trial and ray.get(self._broker.end.remote(trial, TrialState.STOPPED.value, "stopped by a person")):
                self._done.add(name)


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """On each worker; what it returns is a result that the store did not take."""
    began = time.time()
    from jobs.sweep.worker import run_sweep

    workers.give_way(config)  # not before its imports: the trials' processes, which start meanwhile, would starve them
    with workers.entered(config, began) as session:
        result = run_sweep(session, config["broker"])
    return workers.handed_in(session, result)


def cli() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
