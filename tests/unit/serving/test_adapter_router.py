"""Which replica is asked, without Serve. About three seconds, nearly all of it Ray's import."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from ray.serve.config import RequestRouterConfig

from serving.adapter_router import AdapterRouter, ranked

REPLICAS = [f"replica-{n}" for n in range(5)]
ADAPTERS = [f"sha256:{n:064x}" for n in range(1000)]


def idle(replica: str) -> bool:
    return False


def first(adapter: str, replicas: list[str]) -> str:
    return ranked(adapter, replicas, {}, idle)[0][0]


def test_what_is_in_the_engine_comes_before_what_is_in_memory_before_all_others():
    told = {"replica-3": {"engine": ["a"], "memory": ["a"]}, "replica-1": {"engine": [], "memory": ["a"]}}
    groups = ranked("a", REPLICAS, told, idle)
    assert groups[:2] == [["replica-3"], ["replica-1"]]
    assert sorted(r for group in groups for r in group) == REPLICAS
    assert all(len(group) == 1 for group in groups[2:])  # one after the other, or two gateways would load it twice


def test_replicas_that_all_have_it_are_equally_good():
    told = {replica: {"engine": ["a"], "memory": ["a"]} for replica in ("replica-0", "replica-4")}
    assert sorted(ranked("a", REPLICAS, told, idle)[0]) == ["replica-0", "replica-4"]


def test_all_gateways_send_a_cold_adapter_to_the_same_replica():
    for adapter in ADAPTERS[:50]:
        assert first(adapter, REPLICAS) == first(adapter, REPLICAS[::-1])


def test_cold_adapters_spread_evenly():
    counts = Counter(first(adapter, REPLICAS) for adapter in ADAPTERS)
    assert min(counts.values()) > 150
    assert max(counts.values()) < 250


def test_when_a_replica_goes_only_its_own_adapters_move():
    left = [replica for replica in REPLICAS if replica != "replica-2"]
    for adapter in ADAPTERS:
        before = first(adapter, REPLICAS)
        assert before == "replica-2" or first(adapter, left) == before


def test_a_full_batch_comes_last_even_where_the_adapter_is():
    told = {"replica-3": {"engine": ["a"], "memory": ["a"]}}
    groups = ranked("a", REPLICAS, told, lambda replica: replica == "replica-3")
    assert groups[-1] == ["replica-3"]
    assert len(groups) == 5


def test_the_base_alone_may_be_asked_anywhere_but_on_full_replicas():
    groups = ranked(None, REPLICAS, {}, lambda replica: replica == "replica-3")
    assert [sorted(group) for group in groups] == [["replica-0", "replica-1", "replica-2", "replica-4"], ["replica-3"]]


def test_one_that_has_turned_the_request_away_comes_last():
    told = {"replica-3": {"engine": ["a"], "memory": ["a"]}}
    for adapter in ("a", None):
        groups = ranked(adapter, REPLICAS, told, lambda replica: replica == "replica-1", {"replica-3", "replica-4"})
        assert set(groups[-1]) == {"replica-3", "replica-4"}
        assert groups[-2] == ["replica-1"]
        assert sorted(r for group in groups for r in group) == REPLICAS


LOADS = """
import sys
from types import SimpleNamespace
import ray.cloudpickle
from ray.serve.request_router import RequestRouter
from serving.residency import REPLICAS

RequestRouter.update_replicas = lambda self, replicas: None
kind = ray.cloudpickle.loads(sys.stdin.buffer.read())
router = kind.__new__(kind)
router._deployment_id = SimpleNamespace(name="engine")
router.update_replicas([SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"), routing_stats={"version": 7})])
print(REPLICAS)
"""


def test_what_replicas_tell_a_router_as_serve_pickles_it_is_there_for_the_whole_process():
    pickled = RequestRouterConfig(request_router_class=AdapterRouter).get_serialized_request_router_cls()
    done = subprocess.run(
        [sys.executable, "-c", LOADS], input=pickled, capture_output=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.decode().strip() == "{'engine': {'r1': {'version': 7}}}"
