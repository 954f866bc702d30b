"""A real local head in a home of its own: started once, used by every test here, then stopped. 25 to 40 seconds."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from cluster import connect, connect_if_running, local
from cluster.jobs import RayJobClient
from cluster.probe import check, probe, resources_of
from cluster.processes import members
from orchestrator.errors import ClusterError
from orchestrator.runs.client import JobStatus
from orchestrator.settings import Settings

SETTLES = 60.0
"""Seconds to wait for something that takes one or two on a quiet machine."""


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    """A short home, as Ray's sockets are in it."""
    home = Path(tempfile.mkdtemp(prefix="ad", dir="/tmp"))
    settings = Settings(home=home, ray_address=None, store_url=None)
    yield settings
    local.stop(settings)
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def client(settings: Settings) -> RayJobClient:
    """The head, started by two at once: both must end at the same one."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: connect(settings), range(2))
    assert first.dashboard.address == second.dashboard.address
    return first


def _until(client: RayJobClient, job: str, *, running: bool = False) -> JobStatus:
    deadline = time.monotonic() + SETTLES
    while time.monotonic() < deadline:
        known = client.status(job)
        assert known is not None
        if known[0].final or (running and known[0] is JobStatus.RUNNING):
            return known[0]
        time.sleep(0.1)
    raise AssertionError(f"{job} is still {known}: {client.logs(job)}")


def test_a_job_runs_with_the_shipped_code_and_this_python(client: RayJobClient, settings: Settings) -> None:
    code = (
        "import os, sys, orchestrator, ray; print(sys.executable, orchestrator.__file__, os.environ['A']); ray.init()"
    )
    client.submit("one-a1", f'python -c "{code}"', env={"A": "b c"}, metadata={"run": "one"})
    client.submit("one-a1", "false", env={}, metadata={})  # left as it is
    assert _until(client, "one-a1") is JobStatus.SUCCEEDED, client.logs("one-a1")
    log = client.logs("one-a1")
    assert f"\n{Path(sys.executable).parent}/python" in log
    assert f"{settings.home}/ray" in log
    assert "_ray_pkg_" in log
    assert "b c" in log
    assert client.active() == []


def test_cancelling_ends_the_job_and_its_children(client: RayJobClient, settings: Settings) -> None:
    client.submit("two-a1", "sleep 300 & echo child $!; wait", env={}, metadata={})
    assert _until(client, "two-a1", running=True) is JobStatus.RUNNING
    deadline = time.monotonic() + SETTLES
    while "\nchild " not in client.logs("two-a1") and time.monotonic() < deadline:
        time.sleep(0.1)
    child = psutil.Process(int(client.logs("two-a1").split("\nchild ")[1].split()[0]))
    client.stop("two-a1")
    assert _until(client, "two-a1") is JobStatus.STOPPED
    psutil.wait_procs([child], timeout=SETTLES)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    client.stop("two-a1")  # again is no error


def test_a_failed_job_says_so(client: RayJobClient) -> None:
    client.submit("three-a1", "python -c 'raise SystemExit(3)'", env={}, metadata={})
    assert _until(client, "three-a1") is JobStatus.FAILED
    assert "3" in (client.status("three-a1") or ("", ""))[1]


def test_nobody_gets_in_without_the_token(client: RayJobClient) -> None:
    for headers in ({}, {"Authorization": "Bearer 00"}):
        for method, path in (("GET", "/api/jobs/"), ("GET", "/api/version"), ("POST", "/api/jobs/")):
            answer = requests.request(
                method, client.dashboard.address + path, headers=headers, json={"entrypoint": "id"}
            )
            assert answer.status_code in (401, 403), (method, path, answer.text)


def test_everything_listens_on_loopback_only(client: RayJobClient, settings: Settings) -> None:
    found = local.find(settings)
    assert found is not None
    outside, listening = [], 0
    for process in members(found.id, found.session_dir):
        connections = []
        with contextlib.suppress(psutil.NoSuchProcess):  # an idle worker that Ray has just let go
            connections = process.net_connections(kind="tcp")
        for connection in connections:
            address = connection.laddr.ip if connection.laddr else ""
            if connection.status != psutil.CONN_LISTEN:
                continue
            listening += 1
            if address.removeprefix("::ffff:") not in ("127.0.0.1", "::1"):
                outside.append((process.pid, address, connection.laddr.port))
    assert listening >= 3
    assert outside == []


def test_the_probe_sees_versions_store_and_resources(client: RayJobClient, settings: Settings) -> None:
    answer = probe(client, settings.store)
    check(answer, settings.store)
    assert answer.resources == resources_of(client)
    assert answer.resources.addable == []


def test_stopping_leaves_no_process_no_port_and_can_be_repeated(client: RayJobClient, settings: Settings) -> None:
    """Runs last: it stops the head that the others used, in the middle of a job."""
    found = local.find(settings)
    assert found is not None
    client.submit("last-a1", "sleep 300", env={}, metadata={})
    _until(client, "last-a1", running=True)
    processes = members(found.id, found.session_dir)
    assert {p.pid for p in found.processes} <= {p.pid for p in processes}
    assert local.stop(settings)
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(found.address.rsplit(":", 1)[1])))
    assert connect_if_running(settings) is None
    assert not local.stop(settings)
    with pytest.raises(ClusterError, match="cannot be reached"):
        client.status("last-a1")
