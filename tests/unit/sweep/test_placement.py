"""Where trials are computed and how many at once, and why. Instant."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.resources import ClusterResources, NodeResources, fit
from jobs.sweep.placement import Placement, choose
from orchestrator.spec.job import JobSpec

SIX = {"learning_rate": {"grid": [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4]}}


def node(cpus: float, gpus: float = 0) -> NodeResources:
    return NodeResources(name="n", cpus=cpus, gpus=gpus)


def placed(
    nodes: list[NodeResources],
    resources: dict[str, Any] | None = None,
    *,
    tuning: str = "full",
    addable: list[NodeResources] | None = None,
    alone: str | None = None,
    packing: bool = True,
    **sweep: Any,
) -> Placement:
    sections = {"resources": resources or {}, "train": {"packing": packing}, "tuning": {"type": tuning}}
    spec = {"name": "one", "base_model": "m", "data": {"train": "t.jsonl"}, "sweep": {"search": SIX} | sweep}
    job = JobSpec.model_validate(spec | sections)
    cluster = ClusterResources(nodes=nodes, addable=addable or [])
    return choose(job, fit(job.resources, cluster), cluster, alone)


ONE = {"cpus_per_worker": 1}
TWO_CPUS, EIGHT_GPUS = [node(2)], [node(0), node(32, 4), node(32, 4)]


@pytest.mark.parametrize(
    ("nodes", "resources", "most", "at_once", "why"),
    [
        (TWO_CPUS, ONE, "auto", 2, "2 trials at once: each takes 1 CPU of 2"),
        (TWO_CPUS, ONE, 1, 1, "1 trial at once: each takes 1 CPU of 2, and sweep.max_concurrent is 1"),
        (TWO_CPUS, ONE, 5, 2, "2 trials at once: each takes 1 CPU of 2"),
        (TWO_CPUS, ONE | {"workers": 2}, "auto", 1, "1 trial at once: each takes 2 CPUs of 2"),
        (TWO_CPUS, {}, "auto", 1, "each takes 2 CPUs of 2; with resources.cpus_per_worker: 1 there is room for 2"),
        ([node(1)], {}, "auto", 1, "1 trial at once: each takes 1 CPU of 1"),
        ([node(8), node(8)], {}, "auto", 2, "2 trials at once: each takes 8 CPUs of 16"),
        ([node(8), node(8)], {"workers": 3, "cpus_per_worker": 2}, "auto", 2, "each takes 6 CPUs of 16"),
        ([node(64)], ONE, "auto", 6, "6 trials at once: each takes 1 CPU of 64"),
        (EIGHT_GPUS, {}, "auto", 6, "6 trials at once: each takes 1 GPU of 8"),
        (EIGHT_GPUS, {"workers": 2}, "auto", 4, "4 trials at once: each takes 2 GPUs of 8"),
        (EIGHT_GPUS, {"gpus_per_worker": 3}, "auto", 2, "2 trials at once: each takes 3 GPUs of 8"),
        (EIGHT_GPUS, {"gpus_per_worker": 0, "cpus_per_worker": 16}, "auto", 4, "each takes 16 CPUs of 64"),
    ],
)
def test_as_many_are_trained_at_once_as_the_nodes_hold_and_a_person_allows(
    nodes: list[NodeResources], resources: dict[str, Any], most: Any, at_once: int, why: str
) -> None:
    found = placed(nodes, resources, max_concurrent=most, placement="concurrent")
    assert (found.name, found.at_once) == ("concurrent", at_once)
    assert found.why.endswith(why)


def test_what_the_autoscaler_may_add_counts_where_a_person_gives_a_number() -> None:
    addable = [node(8)] * 9
    assert placed([node(8)], {}, addable=addable).at_once == 1
    assert placed([node(8)], {}, addable=addable, max_concurrent=4).at_once == 4
    found = placed([node(2)], {"cpus_per_worker": 8}, addable=addable)
    assert found.at_once == 1
    assert "each takes 8 CPUs, for which nodes are to be added" in found.why


@pytest.mark.parametrize(
    ("spec", "name", "why"),
    [
        ({"tuning": "lora"}, "packed", "one copy of the base model for all trials"),
        ({"tuning": "lora", "placement": "packed"}, "packed", "one copy of the base model for all trials"),
        ({"tuning": "lora", "placement": "concurrent"}, "concurrent", "2 trials at once"),
        (
            {"tuning": "lora", "placement": "one_by_one"},
            "one_by_one",
            "each trial has all that the run asks for: 1 CPU of 2",
        ),
        ({"tuning": "lora", "packing": False}, "concurrent", "train.packing is false; 2 trials at once"),
        ({"tuning": "lora", "alone": "no two go together"}, "concurrent", "no two go together; 2 trials at once"),
        (
            {"tuning": "qlora"},
            "concurrent",
            "tuning.type qlora has no base that stays as it is for the others; 2 trials",
        ),
        ({"tuning": "full", "placement": "concurrent"}, "concurrent", "2 trials at once"),
    ],
)
def test_trials_are_packed_where_they_can_share_a_network(spec: dict[str, Any], name: str, why: str) -> None:
    found = placed(TWO_CPUS, ONE, **spec)
    assert found.name == name
    assert found.why.startswith(why)
