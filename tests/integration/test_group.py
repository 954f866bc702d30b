"""Two workers as Ray Train runs them, with faults: the driver itself on the session's Ray, gloo and ZeRO 2. About two minutes on two
quiet cores.

Each job is `jobs.train.driver.main` in a process of its own; a test may put a line before what every worker does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from orchestrator.errors import JobFailed, OutOfMemory, StoreError
from orchestrator.runs.events import read_events
from orchestrator.runs.logs import read_logs
from orchestrator.runs.result import RunResult
from orchestrator.runs.states import RunState
from orchestrator.store import Store, checkpoint_path, checkpoints_path, result_path

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
    os.environ["ADAPTORY_HOME"] = {home!r}
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
        code = DRIVER.format(home=str(home), before=textwrap.indent(textwrap.dedent(before), "    "))
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


def starts(job: Any) -> int:
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
            def limited(*arguments):
                used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
                try:
                    return whole(*arguments)
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
    assert starts(job) == 1  # what a person must change is not tried again
    assert not any("Traceback" in line.message for line in read_logs(job.store, job.resolved.run))


def test_a_defect_is_named_and_not_tried_again(make_job: Make, drive: Any) -> None:
    job = make_job(resources=TWO | {"workers": 1})
    done = drive(job, "int('three')")
    result = result_of(job, done)
    assert result.state is RunState.FAILED
    assert result.error is not None
    assert result.error["code"] == JobFailed.code
    assert "Worker 0 failed with ValueError: invalid literal for int()" in result.error["message"]
    assert (
        sum(event.type == "phase" for event in read_events(job.store, job.resolved.run)) == 1
    )  # it waited for workers once


@pytest.fixture
def resumable(make_job: Make, tmp_path: Path) -> tuple[Any, RunResult, Store]:
    """A job whose first attempt, on one worker, left the checkpoints of steps 6 and 8; its end; and the store that rank 1
    sees, which a test may change."""
    job = make_job(resources=TWO)
    done = job.work()
    assert sorted(int(name) for name in job.store.children(checkpoints_path(job.resolved.run)))[-2:] == [6, 8]
    return job, done, Store(str(shutil.copytree(job.store.url, tmp_path / "seen by rank 1")))


def seeing(store: Store) -> str:
    return f"""
    if rank == 1:
        config["store"] = {store.url!r}
    """


def test_ranks_that_see_different_checkpoints_go_on_from_that_of_rank_0(
    resumable: tuple[Any, RunResult, Store], drive: Any, tmp_path: Path
) -> None:
    """Rank 1 finds step 8 done, rank 0 only step 6. The end is that of one worker within 1e-4, as in test_zero."""
    job, undisturbed, store = resumable
    job.store.delete(checkpoint_path(job.resolved.run, 8))
    done = drive(job, seeing(store), attempt=2)
    result = result_of(job, done)
    assert result.state is RunState.SUCCEEDED, result.error
    events = read_events(job.store, job.resolved.run)
    assert [event.data["step"] for event in events if "loss" in event.data] == [7, 8]
    ours, theirs = (
        load_file(job.fetched(digest, tmp_path / name) / "adapter_model.safetensors")
        for name, digest in (("ours", result.adapter), ("theirs", undisturbed.adapter))
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=1e-4)


def test_a_rank_that_cannot_read_the_checkpoint_ends_the_group(
    resumable: tuple[Any, RunResult, Store], drive: Any
) -> None:
    job, _, store = resumable
    store.write(f"{checkpoint_path(job.resolved.run, 8)}/weights.safetensors", b"other bytes")
    done = drive(job, seeing(store), attempt=2)
    result = result_of(job, done)
    assert result.state is RunState.FAILED
    assert result.error is not None
    assert result.error["code"] == StoreError.code, result.error
    assert "Worker 1 cannot read the checkpoint at step 8, from which worker 0 goes on" in result.error["message"]
    assert store.url in result.error["message"]
    assert starts(job) == 1
