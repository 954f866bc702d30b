"""How Serve is to scale, replace and end the replicas of a deployment: its options, from the plan. Nothing here asks Ray."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serving.autoscaler import ByLoad
from serving.engine.choice import EngineChoice, VllmChoice
from serving.plan import Plan, Replicas

DRAIN_SECONDS = 300.0
"""For what is being answered by a replica that must go: a long answer of a full batch on a CPU. What takes longer is cut, with
an error at the end of its stream; a replica with nothing to answer goes within 2 s."""

UP_SECONDS, DOWN_SECONDS = 10.0, 120.0
"""For how long more, or fewer, replicas must have been wanted. Starting one costs up to a minute, an idle one only memory."""

_TOLD_SECONDS = 2.0
"""Between two reports of a replica, and of a gateway's handles, to the controller; Serve's 10 s alone would be `UP_SECONDS`."""

_LOOK_BACK_SECONDS = 6.0
"""What the policy sees is a mean over this time."""

_MOST_UNREAD = 8192
"""Tokens: sixteen steps of an engine, `Limits.batch_tokens` each."""

_SURGE_PERCENT = 20
"""Of extra replicas while others are replaced, and at least one: the old ones answer until the new ones are there."""


def reserved_gpus(nodes: Sequence[Mapping[str, float]], engine: EngineChoice) -> int:
    """GPUs that a replica reserves: one, where there are any.

    Where a single machine has a single GPU, our own engine reserves none and uses it all the same (Ray hides no GPU from who
    reserves none): a reserved one is one that no job could have, used or not. Engine and job then share its memory: an
    engine takes a share of what is free for its cache, a job plans with what is free when it starts. vLLM takes it whole.

    Args:
        nodes: of each that is alive, what it has, by Ray's names.
    """
    found = [node.get("GPU", 0) for node in nodes]
    if found == [1] and not isinstance(engine, VllmChoice):
        return 0
    return 1 if any(found) else 0


def engine_scaling(plan: Plan, replicas: Replicas, gpus: int) -> dict[str, Any]:
    """Options of `serve.deployment` for the engines of one base.

    A new version of a replica starts before the old one goes, where no GPU is needed: a spare GPU may not exist, and a
    roll-out that waits for one would never end.
    """
    surge = {"max_surge_percent": 0 if gpus else _SURGE_PERCENT, "graceful_shutdown_timeout_s": DRAIN_SECONDS}
    if replicas.min == replicas.max:
        return surge | {"num_replicas": replicas.max}
    return surge | {"autoscaling_config": _autoscaling(plan, replicas)}


def gateway_scaling(count: int) -> dict[str, Any]:
    """Options of `serve.deployment` for the gateways."""
    return {"num_replicas": count, "max_surge_percent": 100, "graceful_shutdown_timeout_s": DRAIN_SECONDS}


def actor_options(
    plan: Plan, gpus: int, inherited: Mapping[str, str], engine: EngineChoice | None = None
) -> dict[str, Any]:
    """Reserves no CPU: a reserved one is one that no job on a small machine can have, used or not (jobs give way to what
    answers, `jobs.workers.give_way`). And a reservation of none has Ray set OMP_NUM_THREADS to 1, which is for the
    engine to say.

    Args:
        inherited: environment of the job that deploys, where state is.
    """
    environment = {
        "OMP_NUM_THREADS": str(plan.threads or os.cpu_count() or 1),
        # 0.1 ms instead of 3 that a thread waits awake: where others want the cores too, waiting so long halves the speed
        "GOMP_SPINCOUNT": "10000",
        # one event loop a process: a hop to another thread waits for whatever holds Python's lock, the engine's above all
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    } | dict(inherited)
    # a shell reads it
    python = {"py_executable": shlex.quote(engine.python)} if isinstance(engine, VllmChoice) else {}
    return {"num_cpus": 0, "num_gpus": gpus, "runtime_env": {"env_vars": environment} | python}


def _autoscaling(plan: Plan, replicas: Replicas) -> AutoscalingConfig:
    """Where there may be none, one is started at first all the same: a base that cannot be served fails at once, not at the
    first request."""
    limits = {"full_batch": plan.max_sequences, "most_unread": _MOST_UNREAD}
    with warnings.catch_warnings():
        # deprecated for an environment variable that 2.60 does not yet read
        warnings.filterwarnings("ignore", message=".*metrics_interval_s", category=DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            initial_replicas=None if replicas.min else 1,
            upscale_delay_s=UP_SECONDS,
            downscale_delay_s=DOWN_SECONDS,
            downscale_to_zero_delay_s=plan.idle_seconds,
            metrics_interval_s=_TOLD_SECONDS,
            look_back_period_s=_LOOK_BACK_SECONDS,
            policy=AutoscalingPolicy(policy_function=ByLoad, policy_kwargs=limits),
        )
