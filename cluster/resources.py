"""What a cluster has, what its autoscaler may still add, and how a job's workers fit into that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from orchestrator.errors import InsufficientResources
from orchestrator.spec.job import ResourcesSpec


class NodeResources(BaseModel):
    """One node, or one that the autoscaler may add."""

    name: str
    cpus: float
    gpus: float = 0
    memory: float = 0
    """Bytes."""


class ClusterResources(BaseModel):
    nodes: list[NodeResources]
    """Alive now, whether busy or not."""
    addable: list[NodeResources] = []
    """What the autoscaler may still start, one entry for each node; empty without an autoscaler."""

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def memory(self) -> float:
        return sum(node.memory for node in self.nodes)

    def describe(self) -> str:
        """`2 nodes with 10 CPUs and 1 GPU; its autoscaler may add 3 nodes with 24 CPUs and 3 GPUs`."""
        return f"{_sum(self.nodes)}; " + (
            f"its autoscaler may add {_sum(self.addable)}" if self.addable else "no autoscaler adds to it"
        )


@dataclass(frozen=True)
class WorkerShape:
    """What each training worker reserves."""

    workers: int
    gpus_per_worker: int
    cpus_per_worker: int
    waits_for: str = ""
    """A sentence when nodes must be added before the workers can start; empty when the cluster is large enough."""

    @property
    def scarce(self) -> tuple[str, int]:
        """What decides how many groups fit, and how much of it one takes."""
        kind, each = ("GPU", self.gpus_per_worker) if self.gpus_per_worker else ("CPU", self.cpus_per_worker)
        return kind, each * self.workers


def fit(resources: ResourcesSpec, cluster: ClusterResources) -> WorkerShape:
    """The workers' shape, with `auto` settled: GPUs are used if there are any, and CPUs are shared out in full.

    One worker on a CPU gets the largest node's every core; a GPU worker gets its GPUs' share of the node. What the
    nodes of now can't hold but the autoscaler may add is accepted, and said in `waits_for`.

    Raises:
        InsufficientResources: the cluster can never hold it.
    """
    gpus = _gpus_per_worker(resources, cluster)
    for nodes in (cluster.nodes, cluster.nodes + cluster.addable):
        cpus = _cpus_per_worker(resources, gpus, nodes)
        if cpus is not None:
            waits = nodes is not cluster.nodes
            return WorkerShape(resources.workers, gpus, cpus, _waiting(resources, gpus, cpus, cluster) if waits else "")
    raise InsufficientResources(
        f"The job asks for {_asked(resources, gpus, resources.cpus_per_worker)}, more than the cluster can ever give: "
        f"it has {cluster.describe()}.",
        hint="Lower resources.workers, .gpus_per_worker or .cpus_per_worker, or use a larger cluster.",
        asked=resources.model_dump(),
        has=cluster.model_dump(),
    )


def side_by_side(shape: WorkerShape, nodes: list[NodeResources]) -> int:
    """How many groups of such workers the nodes hold at once."""
    return sum(_room(node, shape.gpus_per_worker, shape.cpus_per_worker) for node in nodes) // shape.workers


def _gpus_per_worker(resources: ResourcesSpec, cluster: ClusterResources) -> int:
    if resources.gpus_per_worker != "auto":
        return resources.gpus_per_worker
    return 1 if any(node.gpus >= 1 for node in cluster.nodes + cluster.addable) else 0


def _cpus_per_worker(resources: ResourcesSpec, gpus: int, nodes: list[NodeResources]) -> int | None:
    """CPUs for each worker with which all of them fit, the most possible for `auto`; None when they cannot fit."""
    if resources.cpus_per_worker != "auto":
        wanted: Iterable[int] = [resources.cpus_per_worker]
    else:
        most = max((_share(node, gpus) for node in nodes), default=0)
        wanted = range(most, 0, -1)
    return next((cpus for cpus in wanted if sum(_room(n, gpus, cpus) for n in nodes) >= resources.workers), None)


def _share(node: NodeResources, gpus: int) -> int:
    """CPUs that one worker may have on this node: all, or what belongs to its GPUs."""
    if not gpus:
        return int(node.cpus)
    workers = int(node.gpus // gpus)
    return int(node.cpus // workers) if workers else 0


def _room(node: NodeResources, gpus: int, cpus: int) -> int:
    by_cpu = int(node.cpus // cpus)
    return min(by_cpu, int(node.gpus // gpus)) if gpus else by_cpu


def _asked(resources: ResourcesSpec, gpus: int, cpus: int | str) -> str:
    workers = "1 worker" if resources.workers == 1 else f"{resources.workers} workers"
    each = " with" if resources.workers == 1 else " with each"
    return f"{workers}{each} {count(gpus, 'GPU')} and " + ("at least 1 CPU" if cpus == "auto" else count(cpus, "CPU"))


def _waiting(resources: ResourcesSpec, gpus: int, cpus: int, cluster: ClusterResources) -> str:
    asked = _asked(resources, gpus, cpus)
    return f"Waiting for the autoscaler: {asked} are asked for, and there are {cluster.describe()}."


def _sum(nodes: list[NodeResources]) -> str:
    return (
        f"{count(len(nodes), 'node')} with {count(sum(n.cpus for n in nodes), 'CPU')} and "
        f"{count(sum(n.gpus for n in nodes), 'GPU')}"
    )


def count(number: float | int | str, what: str) -> str:
    """`1 GPU`, `2 CPUs`"""
    number = float(number)
    return f"{number:g} {what}" + ("" if number == 1 else "s")


_UNLIMITED = 1_000
"""Nodes of a group without a limit, and the most that are listed of any."""


# --- asking Ray -----------------------------------------------------------------------------------------------------


def node_resources(name: str, resources: dict[str, float]) -> NodeResources:
    """From Ray's resource names."""
    return NodeResources(
        name=name, cpus=resources.get("CPU", 0), gpus=resources.get("GPU", 0), memory=resources.get("memory", 0)
    )


def cluster_resources() -> ClusterResources:
    """What the cluster has and may get; call it in a process that is connected to Ray (`ray.init`)."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node_resources(node["NodeManagerAddress"], node["Resources"]) for node in alive]
    return ClusterResources(nodes=nodes, addable=_addable(alive))


def _addable(alive: list[dict[str, Any]]) -> list[NodeResources]:
    """Nodes that the autoscaler's node groups still allow; best effort, as Ray has no public call for it.

    KubeRay and `ray up` report their groups to the GCS (autoscaler.proto, ClusterConfig).
    """
    from ray._private.state import state

    try:
        config = state.get_cluster_config()
    except Exception:  # a private call: what fails here must not stop a job that fits anyway
        return []
    if config is None:
        return []
    counts: dict[str, int] = {}
    for node in alive:
        group = (node.get("Labels") or {}).get("ray.io/node-group", "")
        counts[group] = counts.get(group, 0) + 1
    found = []
    for group in config.node_group_configs:
        limit = _UNLIMITED if group.max_count < 0 else group.max_count
        still = max(0, limit - counts.get(group.name, 0))
        found += [node_resources(group.name, dict(group.resources))] * min(still, _UNLIMITED)
    return found
