"""How workers fit. Instant."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.resources import ClusterResources, NodeResources, fit
from orchestrator.errors import InsufficientResources
from orchestrator.spec.job import ResourcesSpec


def node(cpus: float, gpus: float = 0) -> NodeResources:
    return NodeResources(name="n", cpus=cpus, gpus=gpus)


def shape(nodes: list[NodeResources], addable: list[NodeResources] | None = None, **spec: Any) -> tuple[int, int, int]:
    found = fit(ResourcesSpec(**spec), ClusterResources(nodes=nodes, addable=addable or []))
    return found.workers, found.gpus_per_worker, found.cpus_per_worker


@pytest.mark.parametrize(
    ("nodes", "spec", "expected"),
    [
        ([node(2)], {}, (1, 0, 2)),  # one worker: every core
        ([node(2)], {"workers": 2}, (2, 0, 1)),
        ([node(8), node(4)], {}, (1, 0, 8)),  # of the largest node
        ([node(8), node(4)], {"workers": 2}, (2, 0, 4)),
        ([node(8), node(4)], {"workers": 3}, (3, 0, 4)),
        ([node(8)], {"workers": 3}, (3, 0, 2)),
        ([node(0), node(8)], {"workers": 2}, (2, 0, 4)),  # a head that runs nothing
        ([node(16, 4)], {}, (1, 1, 4)),  # a GPU's share, so that the other three stay usable
        ([node(16, 4)], {"workers": 4}, (4, 1, 4)),
        ([node(16, 4)], {"gpus_per_worker": 2}, (1, 2, 8)),
        ([node(16, 4)], {"gpus_per_worker": 0}, (1, 0, 16)),
        ([node(32), node(8, 1)], {}, (1, 1, 8)),  # the GPU's node, not the largest
        ([node(8, 1)], {"cpus_per_worker": 3}, (1, 1, 3)),
    ],
)
def test_auto_uses_what_the_nodes_have(
    nodes: list[NodeResources], spec: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert shape(nodes, **spec) == expected


@pytest.mark.parametrize(
    ("nodes", "spec"),
    [
        ([node(2)], {"workers": 3}),
        ([node(2)], {"gpus_per_worker": 1}),
        ([node(2)], {"cpus_per_worker": 3}),
        ([node(2), node(2)], {"cpus_per_worker": 4}),  # a worker never spans nodes
        ([node(8, 1), node(8)], {"workers": 2}),  # auto means a GPU for each
        ([], {}),
    ],
)
def test_more_than_the_cluster_can_give_is_refused_at_once(nodes: list[NodeResources], spec: dict[str, Any]) -> None:
    with pytest.raises(InsufficientResources):
        shape(nodes, **spec)


def test_the_refusal_says_what_was_asked_what_there_is_and_what_may_be_added() -> None:
    cluster = ClusterResources(nodes=[node(4), node(4)], addable=[node(8, 1)] * 2)
    with pytest.raises(InsufficientResources) as caught:
        fit(ResourcesSpec(workers=4, gpus_per_worker=1), cluster)
    assert "4 workers with each 1 GPU and at least 1 CPU" in caught.value.message
    assert "it has 2 nodes with 8 CPUs and 0 GPUs" in caught.value.message
    assert "its autoscaler may add 2 nodes with 16 CPUs and 2 GPUs" in caught.value.message


def test_what_may_still_be_added_is_waited_for_and_said() -> None:
    cluster = ClusterResources(nodes=[node(0)], addable=[node(8, 1)] * 2)
    found = fit(ResourcesSpec(workers=2), cluster)
    assert (found.gpus_per_worker, found.cpus_per_worker) == (1, 8)
    assert "autoscaler" in found.waits_for
    assert "2 workers with each 1 GPU and 8 CPUs" in found.waits_for


def test_nothing_is_waited_for_when_the_nodes_of_now_suffice() -> None:
    assert fit(ResourcesSpec(), ClusterResources(nodes=[node(2)], addable=[node(64)])).waits_for == ""
