"""Ray Tune's experiment as every placement of trials has it: begun or taken up again, watched, interrupted, and summed up."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import tune

from jobs import workers
from jobs.attempt import Attempt
from jobs.sweep import tuning
from jobs.sweep.broker import Broker
from jobs.sweep.trial import CPUS, ThinTrial
from jobs.sweep.trials import Telling, Trials
from orchestrator.errors import AdaptoryError, JobFailed, StoreError, TrainingDiverged
from orchestrator.runs.result import SweepResult
from orchestrator.runs.states import TrialState
from orchestrator.runs.sweeps import trials_to_stop
from orchestrator.spec.job import JobSpec
from orchestrator.store import names_path, train_storage_path

log = logging.getLogger(__name__)

EXPERIMENT = "tune"
"""Directory of Tune's own state, beside Train's."""
HEARD_SECONDS = 1.0
"""Until Tune has heard an interrupt; it looks several times a second."""
RESTARTS = 3
"""Of a trial's process that dies; its course goes on meanwhile."""


def new_broker(first: int = 0) -> Any:
    """
    Args:
        first: trials that a packed group waits for.
    """
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(BrokerActor).remote(first)


class BrokerActor(Broker):
    """As Ray starts it, and starts it again."""

    def __init__(self, first: int) -> None:
        super().__init__(first=first, again=ray.get_runtime_context().was_current_actor_reconstructed)


def tuner(ours: Attempt, job: JobSpec, broker: Any, at_once: int) -> tune.Tuner:
    """A new experiment, or the one that an earlier attempt left: what has ended there stays as it is, and the rest goes on.

    Args:
        at_once: most trials under way; an experiment that is taken up keeps its own.
    """
    path, filesystem = workers.train_storage(ours.store, ours.run)
    trainable = tune.with_resources(tune.with_parameters(ThinTrial, broker=broker), {"cpu": CPUS})
    if has_state(ours):
        found = f"{path}/{EXPERIMENT}"
        return tune.Tuner.restore(found, trainable, resume_errored=True, storage_filesystem=filesystem)
    sweep = job.sweep
    assert sweep is not None
    space, searcher, samples = tuning.search(job, at_once)
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
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False
            ),  # who computes keeps what there is to keep
            stop=tuning.Ending(),
            callbacks=[Telling()],
            verbose=0,
        ),
    )


def forget(ours: Attempt) -> None:
    """Remove Tune's state, so that the next experiment is a new one."""
    ours.store.delete(_folder(ours))
    ours.store.delete(names_path(ours.run))


def has_state(ours: Attempt) -> bool:
    """Whether an attempt before this one left trials to go on with; what was cut off before there were any is removed."""
    if any(name.startswith("experiment_state-") for name in ours.store.children(_folder(ours))):
        return True
    forget(ours)
    return False


def _folder(ours: Attempt) -> str:
    return f"{train_storage_path(ours.run)}/{EXPERIMENT}"


def nobody_won(result: SweepResult) -> AdaptoryError:
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


class Interrupt:
    """Ends Tune, which has the main thread, from another one: it keeps its state at Ctrl-C, and can be resumed from it. Then it waits for
    the trials' processes, 10 seconds at most, and these for reports; so they are dismissed once it takes nothing from them any more.
    """

    def __init__(self, broker: Any) -> None:
        self._set, self._listening, self._broker = threading.Event(), False, broker

    @property
    def is_set(self) -> bool:
        return self._set.is_set()

    def set(self) -> None:
        self._set.set()
        if self._listening:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(HEARD_SECONDS)
            with suppress(ray.exceptions.RayError):  # Ray itself may be what has ended
                self._broker.dismiss.remote()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """The block is what it ends."""
        self._listening = True
        try:
            yield
        except KeyboardInterrupt:  # Tune does not listen yet
            if not self.is_set:
                raise
        finally:
            self._listening = False


class Watch:
    """Looks every second where trials are, and which of them a person has ended (`adaptory sweep stop-trial`)."""

    def __init__(self, ours: Attempt, trials: Trials, broker: Any):
        self._ours, self._trials, self._broker = ours, trials, broker
        self._over, self._done = threading.Event(), set[str]()
        self._thread = threading.Thread(target=self._run, name="adaptory-watch", daemon=True)

    def __enter__(self) -> Watch:
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
