"""Ray Tune's parts of a sweep: what is searched and by whom, who stops trials early, and what is said of them.

Tune pickles most of them with its experiment, and unpickles them when a sweep is resumed: none may hold what lives in a process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher

from jobs.sweep.broker import PEERS, RUNG
from jobs.sweep.configs import CONFIG, encoded
from orchestrator.spec.job import JobSpec
from orchestrator.spec.search import Choice, Config, Grid, LogUniform, RandInt, SearchRange, Uniform
from orchestrator.spec.sweep import SweepSpec, configs, suggested


def quiet() -> None:
    """Have Tune save its state often, and leave files, tables and warnings that nobody reads."""
    os.environ |= {
        "TUNE_GLOBAL_CHECKPOINT_S": "5",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # reports of trials that go on lack the metrics of those that end
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


# --- what is searched -----------------------------------------------------------------------------------------------


def search(job: JobSpec, at_once: int) -> tuple[dict[str, Any], Searcher | SearchAlgorithm, int]:
    """Tune's space, searcher, and how many samples it draws.

    Random and grid searches are lists that the seed decides, the same that `--dry-run` shows, in the order of `by_trunk`.

    Args:
        at_once: most trials under way.
    """
    sweep = job.sweep
    assert sweep is not None
    listed = configs(job)
    if listed is not None:
        return {CONFIG: tune.grid_search(by_trunk(listed, at_once))}, BasicVariantGenerator(max_concurrent=at_once), 1
    from jobs.sweep.learning import Optuna

    points = [{f"{CONFIG}/{name}": encoded(value) for name, value in point.items()} for point in suggested(job)]
    reported = sweep.metric if sweep.metric == "validation_loss" else f"metrics/{sweep.metric}"  # as Tune flattens it
    searcher = Optuna(metric=reported, mode=sweep.better, points_to_evaluate=points or None, seed=sweep.seed)
    return (
        {CONFIG: {name: domain(one) for name, one in sweep.space.items()}},
        ConcurrencyLimiter(searcher, at_once),
        sweep.count,
    )


def expected(job: JobSpec) -> int:
    """How many trials there are, if no budget ends them."""
    assert job.sweep is not None
    listed = configs(job)
    return job.sweep.count if listed is None else len(listed)


def longest(job: JobSpec) -> float:
    """Epochs of the longest trial."""
    assert job.sweep is not None
    epochs = job.sweep.space.get("train.epochs")
    return max(epochs.ends) if epochs else job.train.epochs


def by_trunk(listed: list[Config], at_once: int) -> list[Config]:
    """The same configurations. Those that differ in epochs alone may share a trunk: the longest of each and the shortest come first, of as
    many trunks as can be under way, which then come to the end of their first epoch side by side; those in between follow when the
    shortest have ended, and ride the trunks that go on.

    Args:
        at_once: most trials under way.
    """
    trunks: dict[str, list[Config]] = {}
    for config in listed:
        rest = {name: value for name, value in config.items() if name != "train.epochs"}
        trunks.setdefault(json.dumps(rest, sort_keys=True), []).append(config)
    ordered = [sorted(trunk, key=lambda config: -config.get("train.epochs", 0)) for trunk in trunks.values()]
    found: list[Config] = []
    size = max(1, at_once // 2)
    for block in (ordered[n : n + size] for n in range(0, len(ordered), size)):
        found += [config for trunk in block for config in (trunk[:1] + trunk[1:][-1:])]
        found += [config for trunk in block for config in trunk[1:-1]]
    return found


def domain(one: SearchRange) -> Any:
    """A range as Tune's."""
    match one:
        case LogUniform():
            return tune.loguniform(*one.ends)
        case Uniform():
            return tune.uniform(*one.ends)
        case RandInt():
            return tune.randint(one.ends[0], one.ends[-1] + 1)  # theirs leaves the last one out
        case Choice() | Grid():
            return tune.choice([encoded(value) for value in one.ends])


# --- who stops early ------------------------------------------------------------------------------------------------


def scheduler(sweep: SweepSpec, longest: float) -> TrialScheduler:
    """By the validation loss, which every trial has at the end of each epoch.

    Args:
        longest: epochs of the longest trial.
    """
    watched: Any = {"time_attr": RUNG, "metric": "validation_loss", "mode": "min"}
    match sweep.scheduler:
        case "asha":
            return Asha(
                **watched,
                grace_period=sweep.grace_epochs,  # type: ignore[arg-type]  # fractions are welcome
                max_t=max(longest, sweep.grace_epochs),  # type: ignore[arg-type]
                reduction_factor=sweep.asha_reduction,
                stop_last_trials=False,
            )
        case "median":
            return MedianStoppingRule(**watched, grace_period=sweep.grace_epochs, min_samples_required=3)
        case "none":
            return FIFOScheduler()


class Asha(AsyncHyperBandScheduler):
    """Asynchronous successive halving that knows what came at the same moment.

    Tune hears of a packed group's trials one after the other, though they come to a rung together: the first would find the rung
    empty and go on, however bad it is, and which one is first is chance. So each is decided about beside all of them.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        peers = {f"peer {name}": -loss for name, loss in result.get(PEERS, []) if name != trial.trial_id}
        rungs = self._trial_info[trial.trial_id]._rungs
        reached: dict[str, float] = next((recorded for rung, recorded in rungs if result.get(RUNG, 0) >= rung), {})
        reached |= {name: loss for name, loss in peers.items() if name.removeprefix("peer ") not in reached}
        try:
            return super().on_trial_result(tune_controller, trial, result)
        finally:
            for name in peers:
                reached.pop(name, None)


class Ending(tune.Stopper):
    """Ends the whole sweep when its budget is spent."""

    spent: Callable[[], str | None] = staticmethod(lambda: None)
    """Asked for what is, in words. Of this process: Tune pickles a stopper with its experiment."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return Ending.spent() is not None


class Budget:
    """Seconds and tokens that a sweep may take.

    Args:
        seconds: asked how long was trained.
        tokens: asked how many were computed.
    """

    def __init__(self, sweep: SweepSpec, seconds: Callable[[], float], tokens: Callable[[], int]):
        self._budget, self._seconds, self._tokens = sweep.budget, seconds, tokens

    @property
    def spent(self) -> str | None:
        """What is, in words."""
        if self._budget is None:
            return None
        if self._budget.seconds is not None and self._seconds() >= self._budget.seconds:
            return f"{self._budget.seconds:g} seconds"
        if self._budget.tokens is not None and self._tokens() >= self._budget.tokens:
            return f"{self._budget.tokens:,} tokens"
        return None
