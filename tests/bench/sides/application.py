"""The real application on a Ray of its own, for as long as a side lives: proxy, gateway, handle, engine replica."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from serving.plan import Plan

GATEWAY, ENGINE = "ServeReplica:adaptory:gateway", "ServeReplica:adaptory:engine"
"""Parts of the command lines of the processes that Serve starts."""


@contextlib.contextmanager
def serving(plan: Plan, core: int) -> Iterator[str]:
    """Serves what the database of `ADAPTORY_HOME` has; yields where.

    Args:
        core: on which the engine's replica runs; nothing keeps others from it but the affinity that they inherit.
    """
    from serving.app import deploy

    names = (
        "PYTHONPATH",
        "ADAPTORY_HOME",
        "HF_HUB_OFFLINE",
        *(name for name in os.environ if name.startswith("RAY_SERVE_")),
    )
    environment = {name: os.environ[name] for name in names if name in os.environ}
    # the niceness of what is measured beside it; 15 would measure what else runs here
    with own_ray(environment, _system_config={"worker_niceness": 0}):
        deploy(plan)
        for thread in process(ENGINE).threads():
            os.sched_setaffinity(thread.id, {core})
        time.sleep(2)  # routes are seen within two seconds
        yield f"http://{plan.host}:{plan.port}"


@contextlib.contextmanager
def own_ray(environment: dict[str, str], **more: Any) -> Iterator[None]:
    """A Ray of two CPUs, which ends with the block, and what Serve has on it before.

    Args:
        environment: of its workers.
        more: for `ray.init`.
    """
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="ah-", dir="/tmp") as directory:
        token = Path(directory) / "token"  # never the person's own
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            _temp_dir=directory,
            runtime_env={"env_vars": environment},
            **more,
        )
        try:
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def process(part: str) -> psutil.Process:
    """The one below this one whose command line has this part."""
    (found,) = [p for p in psutil.Process().children(recursive=True) if part in " ".join(p.cmdline())]
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
