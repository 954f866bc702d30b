"""What both sides of `sweep_vs_tune` that follow the usual way have in common: Ray Tune, a process for each trial, ASHA.

Imports Ray alone, since one side runs in an environment without ours.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

Case = dict[str, Any]
RUNG = "rung"
"""Epochs done, in the reports of trials that go on: a short schedule that is finished is not compared with a long one that is not."""


def reported(validation_loss: float, epoch: float, epochs: float, **more: Any) -> dict[str, Any]:
    return {"validation_loss": validation_loss, "epoch": epoch, **({RUNG: epoch} if epoch < epochs else {}), **more}


def run(train: Callable[[Case, Case], None], case: Case, trials: list[Case], early: bool) -> dict[str, Any]:
    """All trials, as many at once as there are places, each in a process of its own with its share of the cores.

    Args:
        train: (trial, case); reports by `tune.report(reported(…))` after each epoch.
        case: `places` at once, of `threads` cores each; `longest` epochs of a trial.
        early: whether ASHA ends trials.

    Returns:
        `makespan` and each trial's `seconds` (from when its place was free to its end), `epoch` and `validation_loss`.
    """
    began = time.perf_counter()
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    path["OMP_NUM_THREADS"] = str(case["threads"])
    ray.init(num_cpus=case["places"], include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": path})
    scheduler: Any = FIFOScheduler()
    if early:
        scheduler = AsyncHyperBandScheduler(
            time_attr=RUNG, metric="validation_loss", mode="min", grace_period=1, max_t=case["longest"],
            reduction_factor=2, stop_last_trials=False,
        )  # fmt: skip
    watch = Watch()
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, train=train, case=case), {"cpu": 1}),
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(scheduler=scheduler),
        run_config=tune.RunConfig(name="sweep", storage_path=case["storage"], callbacks=[watch], verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise SystemExit(f"A trial failed: {results.errors[0]}")
    makespan = time.perf_counter() - began
    ray.shutdown()
    done = []
    for one in (results[number] for number in range(len(results))):
        config, last = one.config, one.metrics
        assert config is not None
        assert last is not None
        kept = {name: last[name] for name in ("epoch", "validation_loss", "steps", "peak_rss_mb") if name in last}
        seconds = watch.seconds[last["trial_id"]]
        done.append({**config["trial"], **kept, "finished": RUNG not in last, "seconds": seconds})
    return {"makespan": makespan, "start": watch.began - began, "trials": done}


class Watch(tune.Callback):
    """When places were taken: a trial's time begins when the one before it in its place ended, or when Tune began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._free: list[float] = []
        self._since: dict[str, float] = {}

    def setup(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._since[trial.trial_id] = self._free.pop(0) if self._free else self.began

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.seconds[trial.trial_id] = now - self._since[trial.trial_id]
        self._free.append(now)


def _trial(config: Case, train: Callable[[Case, Case], None], case: Case) -> None:
    train(config["trial"], case)


def answer(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)
