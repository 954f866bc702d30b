"""Which processes belong to one local head, and how they end. Never by name: `ray stop` would end everybody's Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import psutil

MARKER = "ADAPTORY_CLUSTER"
"""Environment variable with the cluster's id, inherited by every process of the head."""

_GRACE_SECONDS = 2.0
"""For workers to end. The raylet waits over six seconds for a GCS that got the same signal: no use waiting for."""


def members(cluster_id: str, session_dir: str) -> list[psutil.Process]:
    """Processes of one head: those with its marker or its session directory, and all that descend from them.

    Three signs are needed: Ray workers rename themselves over their environment, daemons leave their parent, and a
    job's own children have neither name nor argument in common with the cluster.
    """
    wanted = f"{MARKER}={cluster_id}"
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _belongs(process, wanted, session_dir):
            found[process.pid] = process
            try:
                found |= {child.pid: child for child in process.children(recursive=True) if child.pid != os.getpid()}
            except psutil.Error:
                continue
    return sorted(found.values(), key=lambda process: process.pid)


def end(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """SIGTERM, a few seconds, SIGKILL; returns those that are still there."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return psutil.wait_procs(alive, timeout=_GRACE_SECONDS)[1]


def running(pid: int, created: float) -> bool:
    """Whether this very process still runs; a pid alone may have been given to another one."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _belongs(process: psutil.Process, marker: str, session_dir: str) -> bool:
    try:
        command = process.cmdline()
        if session_dir and any(session_dir in part for part in command):
            return True
        name, _, value = marker.partition("=")
        return process.environ().get(name) == value
    except (psutil.Error, OSError, ValueError):  # gone, or somebody else's
        return False
