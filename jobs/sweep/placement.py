"""How a sweep's trials are computed: packed on one copy of the base, or apart from each other, and then how many at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cluster.resources import ClusterResources, WorkerShape, count, side_by_side
from orchestrator.spec.job import JobSpec


@dataclass(frozen=True)
class Placement:
    name: Literal["packed", "concurrent", "one_by_one"]
    at_once: int
    """Trials that are computed at the same time, each by workers of its own; packed ones share theirs."""
    why: str


def choose(job: JobSpec, shape: WorkerShape, cluster: ClusterResources, alone: str | None = None) -> Placement:
    """
    Args:
        shape: the workers of one trial.
        alone: why the trials cannot share a network, if a group has found out.
    """
    assert job.sweep is not None
    asked, alone = job.sweep.placement, alone or why_alone(job)
    if asked == "packed" or (asked == "auto" and alone is None):
        return Placement("packed", 1, "one copy of the base model for all trials")
    if asked == "one_by_one":
        return Placement("one_by_one", 1, f"each trial has all that the run asks for: {_share(shape, cluster)}")
    at_once, words = _at_once(job, shape, cluster)
    return Placement("concurrent", at_once, f"{alone}; {words}" if alone and asked == "auto" else words)


def why_alone(spec: JobSpec) -> str | None:
    """Why no network can be shared by trials of this spec; None where the network decides."""
    if spec.tuning.type != "lora":
        return f"tuning.type {spec.tuning.type} has no base that stays as it is for the others"
    return None if spec.train.packing else "train.packing is false"


def _at_once(job: JobSpec, shape: WorkerShape, cluster: ClusterResources) -> tuple[int, str]:
    """As many as the nodes of now hold; what the autoscaler may add counts where a person has given a number."""
    assert job.sweep is not None
    asked, fit = job.sweep.max_concurrent, max(1, side_by_side(shape, cluster.nodes))
    if isinstance(asked, int):
        fit = max(fit, side_by_side(shape, cluster.nodes + cluster.addable))
    at_once = min(fit, job.sweep.count, asked if isinstance(asked, int) else fit)
    words = f"{count(at_once, 'trial')} at once: each takes {_share(shape, cluster)}"
    if at_once < min(fit, job.sweep.count):
        return at_once, f"{words}, and sweep.max_concurrent is {asked}"
    if at_once == 1 < job.sweep.count and (half := _halved(job, shape, cluster)) is not None:
        return 1, f"{words}; with resources.cpus_per_worker: {half.cpus_per_worker} there is room for " + (
            f"{side_by_side(half, cluster.nodes)}"
        )
    return at_once, words


def _share(shape: WorkerShape, cluster: ClusterResources) -> str:
    """`1 CPU of 2`"""
    kind, each = shape.scarce
    if shape.waits_for:
        return f"{count(each, kind)}, for which nodes are to be added"
    return f"{count(each, kind)} of {cluster.gpus if kind == 'GPU' else cluster.cpus:g}"


def _halved(job: JobSpec, shape: WorkerShape, cluster: ClusterResources) -> WorkerShape | None:
    """Workers with half of the CPUs, where a person has left it open how many they have and two groups would fit."""
    half = replace(shape, cpus_per_worker=shape.cpus_per_worker // 2)
    if shape.gpus_per_worker or job.resources.cpus_per_worker != "auto" or not half.cpus_per_worker:
        return None
    return half if side_by_side(half, cluster.nodes) > 1 else None
