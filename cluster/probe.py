"""Before a job is queued: do the nodes run the same versions, and do they reach the store?

The question is asked from where the job will run: a tiny Ray job puts one task on every alive node. Each answer becomes
an error of its own, so that a wrong credential is not found out an hour later by a worker.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import time
import uuid
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.jobs import RayJobClient
from cluster.resources import ClusterResources, fit, node_resources
from orchestrator import __version__
from orchestrator.errors import AdaptoryError, ClusterError, StoreError
from orchestrator.runs.client import JobStatus
from orchestrator.runs.launch import job_env
from orchestrator.settings import Settings
from orchestrator.spec.job import JobSpec
from orchestrator.store import Store

MARK = "ADAPTORY-PROBE "
"""Begins the one line of the probe's log that is its answer."""

CACHED_SECONDS = 600.0
"""A good answer is believed this long; a bad one is never kept."""

_DEADLINE_SECONDS = 180.0
"""On a large cluster the first job waits for the runtime environment of every node."""


class NodeAnswer(BaseModel):
    """What one node says about itself."""

    node: str
    python: str
    """`3.11.7`"""
    ray: str
    project: str
    store_error: dict[str, Any] | None = None
    """`StoreError.to_dict()` when the node cannot use the store."""


class ProbeAnswer(BaseModel):
    nodes: list[NodeAnswer]
    silent: dict[str, str] = {}
    """Nodes that did not answer, and why."""
    resources: ClusterResources


def preflight(client: RayJobClient, settings: Settings, spec: JobSpec) -> None:
    """Refuse now what could never run: versions that differ, a store out of reach, more than the cluster can ever give.

    A local Ray shares this machine's disk and environment, so only its resources are compared, unless the store is S3.

    Raises:
        ClusterError: a node has another Python or Ray, or does not answer.
        StoreError: this machine or a node cannot use the store, and which one.
        InsufficientResources: the job can never fit.
    """
    if client.local and "://" not in settings.store:
        fit(spec.resources, resources_of(client))
        return
    answer = _cached(client, settings) or probe(client, settings.store, env=job_env(settings, Store(settings.store)))
    check(answer, settings.store)
    _remember(client, settings, answer)
    fit(spec.resources, answer.resources)


def known_resources(client: RayJobClient, settings: Settings) -> ClusterResources | None:
    """What the cluster has, as far as that is known without a job: of one with other machines, what its last probe said."""
    if client.local:
        return resources_of(client)
    answer = _cached(client, settings)
    return answer.resources if answer else None


def resources_of(client: RayJobClient) -> ClusterResources:
    """What the cluster has, asked over HTTP, without its autoscaler (a local Ray has none)."""
    rows = client.dashboard.nodes()
    return ClusterResources(nodes=[node_resources(row["node_ip"], row["resources_total"]) for row in rows])


def probe(client: RayJobClient, store_url: str, *, env: dict[str, str] | None = None) -> ProbeAnswer:
    """Run the probe job and return what the nodes say.

    Args:
        env: what a run's job would get, so that the probe finds an S3-compatible store where the job will.

    Raises:
        ClusterError: the job did not start, failed or gave no answer; says what it printed.
    """
    submission_id = f"adaptory-probe-{uuid.uuid4().hex[:12]}"
    # A node that does not share this machine's disk would happily write to a directory of its own: it must read ours.
    store, ours = Store(store_url), f"probes/{submission_id}"
    store.write(ours, submission_id.encode())
    try:
        entrypoint = shlex.join(["python", "-m", "cluster.probe_job", store_url, ours])
        client.submit(submission_id, entrypoint, env=env or {}, metadata={})
        state, message = _wait(client, submission_id)
    finally:
        store.delete(ours)
    log = client.logs(submission_id)
    lines = [line.removeprefix(MARK) for line in log.splitlines() if line.startswith(MARK)]
    try:
        if state is JobStatus.SUCCEEDED and lines:
            answer = ProbeAnswer.model_validate_json(lines[-1])
            client.delete(submission_id)
            return answer
    except ValidationError:
        pass
    tail = " | ".join(line for line in log.strip().splitlines()[-3:]) or message
    raise ClusterError(
        f"The probe on Ray at {client.dashboard.address} ended as {state.value} without an answer: {tail[-600:]}",
        hint="The nodes need Python with this project's packages (cluster/Dockerfile makes such an image); "
        "`ray job logs` of the probe shows more.",
        submission_id=submission_id,
    )


def check(answer: ProbeAnswer, store_url: str) -> None:
    """Turn what the nodes said into the one error that comes first, if any.

    Raises:
        ClusterError, StoreError: as `preflight`.
    """
    here = local_versions()
    for node in answer.nodes:
        for what, theirs, ours in (
            ("Python", _minor(node.python), _minor(here["python"])),
            ("Ray", node.ray, here["ray"]),
            ("Adaptory", node.project, here["project"]),
        ):
            if theirs != ours:
                raise ClusterError(
                    f"Node {node.node} runs {what} {theirs}, this machine {ours}.",
                    hint=f"Use an image with {what} {ours} (cluster/Dockerfile), or an environment here with {theirs}.",
                    node=node.node,
                )
        if node.store_error is not None:
            raise _store_error(node, store_url)
    for node_name, reason in answer.silent.items():
        raise ClusterError(
            f"Node {node_name} did not answer the probe: {reason} ({len(answer.silent)} of "
            f"{len(answer.silent) + len(answer.nodes)} nodes did not).",
            hint="Its image may lack this project's packages, or it is broken: see the node in Ray's dashboard.",
            nodes=sorted(answer.silent),
        )


def local_versions() -> dict[str, str]:
    """Python, Ray and project here; without importing Ray."""
    return {"python": platform.python_version(), "ray": version("ray"), "project": __version__}


def _store_error(node: NodeAnswer, store_url: str) -> StoreError:
    assert node.store_error is not None
    cause = AdaptoryError.from_dict(node.store_error)
    if "://" not in store_url:
        return StoreError(
            f"Node {node.node} cannot reach the store {store_url}, a directory of this machine: {cause.message}",
            hint="Set ADAPTORY_STORE_URL to s3://BUCKET/PREFIX, or to a directory that every node mounts.",
            url=store_url,
            node=node.node,
        )
    return StoreError(
        f"Node {node.node} cannot use the store: {cause.message}",
        hint=f"{cause.hint or ''} A local Ray takes credentials from the shell where it was started "
        "(`adaptory down`, then `adaptory up`), a pod from its secret.".strip(),
        url=store_url,
        node=node.node,
    )


def _wait(client: RayJobClient, submission_id: str) -> tuple[JobStatus, str]:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    pause = 0.1
    while time.monotonic() < deadline:
        known = client.status(submission_id)
        if known is not None and known[0].final:
            return known
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    client.stop(submission_id)
    raise ClusterError(
        f"The probe on Ray at {client.dashboard.address} did not end within {_DEADLINE_SECONDS:.0f} s.",
        hint="See Ray's dashboard: the head node may be overloaded or have no room for a process.",
        submission_id=submission_id,
    )


# --- remembering ----------------------------------------------------------------------------------------------------


def _cached(client: RayJobClient, settings: Settings) -> ProbeAnswer | None:
    path = settings.cache / "probes" / f"{_key(client, settings)}.json"
    try:
        if time.time() - path.stat().st_mtime < CACHED_SECONDS:
            return ProbeAnswer.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        pass
    return None


def _remember(client: RayJobClient, settings: Settings, answer: ProbeAnswer) -> None:
    path = settings.cache / "probes" / f"{_key(client, settings)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or time.time() - path.stat().st_mtime >= CACHED_SECONDS:
        path.write_text(answer.model_dump_json())


def _key(client: RayJobClient, settings: Settings) -> str:
    """Another session, another set of nodes, another store or other versions here are another question."""
    nodes = sorted(row["node_id"] for row in client.dashboard.nodes())
    asked = [client.dashboard.address, nodes, settings.store, local_versions()]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
