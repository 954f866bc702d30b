"""The command over a real database and store in a temporary home, and over a cluster that lives in memory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster
from orchestrator.cli import main
from orchestrator.errors import ClusterError
from orchestrator.runs.client import JobStatus
from orchestrator.runs.events import EventWriter
from orchestrator.runs.result import AnswerSample, EvaluationResult, RunResult
from orchestrator.runs.states import RunState
from orchestrator.store import Store, result_path

DIGEST = "sha256:" + "ab" * 32


@dataclass
class MemoryCluster:
    """A cluster whose jobs do what `plays` says as soon as they are submitted."""

    plays: Callable[[Store, str, int], JobStatus]
    jobs: dict[str, JobStatus] = field(default_factory=dict)
    local: bool = True
    up: bool = True
    printed: str = ""

    dashboard: Any = field(
        default_factory=lambda: SimpleNamespace(
            nodes=lambda: [{"node_ip": "127.0.0.1", "resources_total": {"CPU": 2.0, "memory": 8e9}}]
        )
    )

    def submit(self, submission_id: str, entrypoint: str, *, env: dict[str, str], metadata: dict[str, str]) -> None:
        words = entrypoint.split()
        store = Store(words[words.index("--store") + 1])
        self.jobs[submission_id] = self.plays(store, metadata["run"], int(metadata["attempt"]))

    def status(self, submission_id: str) -> tuple[JobStatus, str] | None:
        if not self.up:
            raise ClusterError("Ray at http://memory cannot be reached.", hint="Start it.")
        status = self.jobs.get(submission_id)
        return (status, "") if status else None

    def stop(self, submission_id: str) -> None:
        if self.jobs.get(submission_id) is JobStatus.RUNNING:
            self.jobs[submission_id] = JobStatus.STOPPED

    def logs(self, submission_id: str) -> str:
        return self.printed

    def describe(self) -> dict[str, Any]:
        return {"address": "http://memory"}


def trains(store: Store, run: str, attempt: int, steps: int = 30) -> EventWriter:
    """The events of a job that trains."""
    writer = EventWriter(store, run, attempt, "driver")
    writer.emit("state", state="running")
    writer.emit("phase", phase="training")
    for step in range(1, steps + 1):
        figures = {"loss": 3.0 / step, "learning_rate": 1e-3, "tokens_per_second": 200.0, "seconds_left": steps - step}
        writer.emit("metrics", step=step, total_steps=steps, **figures)
        if step % 10 == 0:
            writer.emit("metrics", step=step, validation_loss=3.1 / step)
    return writer


def ends(store: Store, run: str, attempt: int, state: RunState = RunState.SUCCEEDED, **facts: Any) -> None:
    result = RunResult(attempt=attempt, state=state, finished_at=time.time(), **facts)
    store.write_json(result_path(run), result.model_dump(mode="json"))


def succeeds(store: Store, run: str, attempt: int) -> JobStatus:
    trains(store, run, attempt).close()
    sample = AnswerSample(prompt="Ada works at Acme.", expected='{"person": ["Ada"]}', before="Ada?", after="yes, Ada")
    ends(
        store,
        run,
        attempt,
        adapter=DIGEST,
        metrics={"train_loss": 0.1, "steps": 30, "peak_memory_bytes": 1.5e9},
        evaluation=EvaluationResult(rows=60, before={"entity_f1": 0.0}, after={"entity_f1": 0.66}, samples=[sample]),
        seconds={"load_model": 1.25, "training": 60.0},
    )
    return JobStatus.SUCCEEDED


def fails(store: Store, run: str, attempt: int) -> JobStatus:
    trains(store, run, attempt, steps=3).close()
    error = {"code": "training_diverged", "message": "The loss is nan at step 4.", "hint": "Lower it.", "step": 4}
    ends(store, run, attempt, RunState.FAILED, error=error)
    return JobStatus.FAILED


def keeps_running(store: Store, run: str, attempt: int) -> JobStatus:
    trains(store, run, attempt, steps=12).close()
    return JobStatus.RUNNING


@pytest.fixture
def plays() -> SimpleNamespace:
    """What jobs may do, and the parts of it."""
    return SimpleNamespace(
        succeeds=succeeds, fails=fails, keeps_running=keeps_running, trains=trains, ends=ends, digest=DIGEST
    )


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def memory_cluster(monkeypatch: pytest.MonkeyPatch) -> MemoryCluster:
    """Stands in for Ray, both to submit to and to look at."""
    found = MemoryCluster(plays=succeeds)
    monkeypatch.setattr(cluster, "connect", lambda settings, say: found)
    monkeypatch.setattr(cluster, "connect_if_running", lambda settings: found)
    return found


@pytest.fixture
def out_of_reach(memory_cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, a command that looks for a cluster or starts one crashes."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the command reached for the cluster")

    def begin() -> None:
        monkeypatch.setattr(cluster, "connect", never)
        monkeypatch.setattr(cluster, "connect_if_running", never)

    return begin


@pytest.fixture
def adaptory(capfd: pytest.CaptureFixture[str], memory_cluster: MemoryCluster) -> Callable[..., Answer]:
    """Runs the command in this process: `adaptory("runs", "list")`."""

    def call(*args: str | Path) -> Answer:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Answer(code, out, re.sub(r"\s+\n", "\n", err))

    return call


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small job in the current directory, on a model of the catalogue, which need not be fetched to be submitted."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "job.yaml").write_text(
        "name: sums\nbase_model: smollm2-135m-instruct\n"
        "data: {train: rows.jsonl, validation: 0.1}\ntrain: {epochs: 2, batch_size: 8}\n"
    )
    return tmp_path / "job.yaml"
