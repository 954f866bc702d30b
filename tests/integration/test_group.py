"""Two workers as Ray Train runs them, with faults: the driver itself on the session's Ray, gloo and ZeRO 2. About two minutes.

Each job is `jobs.train.driver.main` in a process of its own; a test may put a line before what every worker does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.errors import OutOfMemory
from orchestrator.runs.events import read_events
from orchestrator.runs.logs import read_logs
from orchestrator.runs.result import RunResult
from orchestrator.runs.states import RunState
from orchestrator.store import result_path

PATIENCE = 420.0
"""Seconds for a job that takes twenty on a quiet machine."""
ROOT = Path(__file__).resolve().parents[2]
TWO = {"workers": 2, "cpus_per_worker": 1, "max_failures": 2}
Make = Callable[..., Any]

DRIVER = """
import sys
from jobs.train import driver

begin = driver._worker

def worker(config):
    import os, ray.train
    rank = ray.train.get_context().get_world_rank()
{before}
    return begin(config)

driver._worker = worker
sys.exit(driver.main(sys.argv[1:]))
"""


@pytest.fixture
def drive(ray_local: None, home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`drive(job, before="", attempt=1)`: the whole job, with Python that each worker runs first."""

    def run(job: Any, before: str = "", attempt: int = 1) -> subprocess.CompletedProcess[str]:
        code = DRIVER.format(before=textwrap.indent(textwrap.dedent(before), "    "))
        words = ["--store", job.store.url, "--run", job.resolved.run, "--attempt", str(attempt)]
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
                "ADAPTORY_HOME": str(home),
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


def result_of(job: Any, done: subprocess.CompletedProcess[str]) -> RunResult:
    assert job.store.exists(result_path(job.resolved.run)), done.stdout[-3000:] + done.stderr[-6000:]
    return RunResult.model_validate(job.store.read_json(result_path(job.resolved.run)))


def starts(job: Any, done: subprocess.CompletedProcess[str]) -> int:
    """How often the group was started."""
    events = read_events(job.store, job.resolved.run)
    return sum(event.type == "phase" and event.data["phase"] == "loading" for event in events)


def test_memory_that_runs_out_on_one_rank_ends_the_group(make_job: Make, drive: Any) -> None:
    """A real failure of an allocation under RLIMIT_AS on rank 1, while rank 0 waits in a collective."""
    job = make_job(resources=TWO, train={"micro_batch_tokens": 65536, "batch_size": 256, "epochs": 16})
    done = drive(
        job,
        """
        if rank == 1:
            import resource
            from jobs.train import loop
            whole = loop.forward
            def limited(model, batch, slot):
                used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
                try:
                    return whole(model, batch, slot)
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            loop.forward = limited
        """,
    )
    result = result_of(job, done)
    assert done.returncode == 1
    assert result.state is RunState.FAILED
    assert result.error is not None
    assert result.error["code"] == OutOfMemory.code, result.error
    assert "MiB more were wanted" in result.error["message"]
    assert result.error["tokens"] > 1000
    assert f"Set train.micro_batch_tokens to {result.error['tokens'] // 2}" in result.error["hint"]
    assert starts(job, done) == 1  # what a person must change is not tried again
    assert not any("Traceback" in line.message for line in read_logs(job.store, job.resolved.run))
