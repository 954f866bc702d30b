"""`python -m cluster.probe_job STORE_URL PATH`: what `cluster.probe` runs on the cluster; prints one line."""

from __future__ import annotations

import platform
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.probe import MARK, NodeAnswer, ProbeAnswer
from cluster.resources import cluster_resources
from orchestrator import __version__
from orchestrator.errors import StoreError
from orchestrator.store import Store

_NODE_SECONDS = 90.0


def answer_here(node: str, store_url: str, path: str) -> str:
    """One node's answer, as JSON. `path` is an object that the asking machine has just written to the store."""
    answer = NodeAnswer(node=node, python=platform.python_version(), ray=ray.__version__, project=__version__)
    try:
        store = Store(store_url)
        store.read(path)
        store.probe()
    except StoreError as error:
        answer.store_error = error.to_dict()
    return answer.model_dump_json()


def ask_all(store_url: str, path: str) -> ProbeAnswer:
    """One task pinned to each alive node; it reserves nothing, so a busy cluster answers too."""
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    task = ray.remote(answer_here)
    pending = {}
    for node_id, name in names.items():
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        pinned = task.options(num_cpus=0, max_retries=0, scheduling_strategy=here)
        pending[pinned.remote(name, store_url, path)] = name
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=_NODE_SECONDS)
    answers, silent = [], {pending[ref]: f"nothing within {_NODE_SECONDS:.0f} s" for ref in late}
    for ref in done:
        try:
            answers.append(NodeAnswer.model_validate_json(ray.get(ref)))
        except ray.exceptions.RayError as error:
            silent[pending[ref]] = str(error).strip().splitlines()[-1][:300]
    return ProbeAnswer(nodes=answers, silent=silent, resources=cluster_resources())


def main() -> None:
    # Workers then import `answer_here` by name; from `__main__` its bytecode would travel, for one Python version only.
    from cluster.probe_job import ask_all as ask

    ray.init(log_to_driver=False)
    sys.stdout.write(f"\n{MARK}{ask(*sys.argv[1:3]).model_dump_json()}\n")


if __name__ == "__main__":
    main()
