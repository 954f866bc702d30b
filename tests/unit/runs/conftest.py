"""A control plane without a cluster: a real database and store in a temporary directory, and Ray's jobs in memory."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db import Database, leases, open_database
from orchestrator.errors import ClusterError
from orchestrator.registry.signing import Keys
from orchestrator.runs import submission
from orchestrator.runs.client import JobStatus
from orchestrator.runs.events import EventWriter
from orchestrator.runs.reconcile import ReconcileReport, reconcile
from orchestrator.runs.repository import get_run
from orchestrator.runs.result import RunResult
from orchestrator.runs.run import Run
from orchestrator.runs.states import RunState
from orchestrator.settings import Settings
from orchestrator.spec.job import DataSpec, JobSpec
from orchestrator.spec.resolved import ResolvedData, StoredFile
from orchestrator.store import Store, adapter_path, result_path

DIGEST = "sha256:" + "ab" * 32


@dataclass
class Job:
    entrypoint: str
    env: dict[str, str]
    metadata: dict[str, str]
    status: JobStatus = JobStatus.RUNNING
    message: str = ""
    logs: str = ""


@dataclass
class MemoryJobs:
    """Ray's Jobs API in memory; `stubborn` jobs go on for a while after a stop."""

    jobs: dict[str, Job] = field(default_factory=dict)
    away: bool = False
    stubborn: bool = False
    submitted: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def _reach(self) -> None:
        if self.away:
            raise ClusterError("Ray at http://test:8265 cannot be reached.", hint="Start it.")

    def submit(self, submission_id: str, entrypoint: str, *, env: dict[str, str], metadata: dict[str, str]) -> None:
        self._reach()
        if submission_id not in self.jobs:
            self.submitted.append(submission_id)
            self.jobs[submission_id] = Job(entrypoint, env, metadata)

    def status(self, submission_id: str) -> tuple[JobStatus, str] | None:
        self._reach()
        job = self.jobs.get(submission_id)
        return (job.status, job.message) if job else None

    def stop(self, submission_id: str) -> None:
        self._reach()
        self.stopped.append(submission_id)
        job = self.jobs.get(submission_id)
        if job and not job.status.final and not self.stubborn:
            job.status = JobStatus.STOPPED

    def logs(self, submission_id: str) -> str:
        self._reach()
        return self.jobs[submission_id].logs

    def describe(self) -> dict[str, Any]:
        return {"address": "http://test:8265"}


def spec(name: str = "entities", tenant: str = "default") -> JobSpec:
    return JobSpec(name=name, tenant=tenant, base_model="some/model", data=DataSpec(train="train.jsonl"))


def resolve_data(spec: DataSpec, *, store: Store) -> ResolvedData:
    store.write("files/abc", b"{}\n")
    return ResolvedData(train=[StoredFile(name="train.jsonl", sha256="abc", size=3)], validation=0.1)


class Killed(BaseException):
    """The process dies here; nothing that it does afterwards has any effect."""


class Fuse:
    """Kills the main thread's work at the n-th of its points: before each transaction, store access and call of Ray. (What is
    killed inside one of those has either happened or not: they are atomic.)"""

    def __init__(self) -> None:
        self.left: int | None = None
        self.dead = False

    def point(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self.left is not None and not self.dead:
            self.left -= 1
            self.dead = self.left < 0
        if self.dead:
            raise Killed

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.point()
            return function(*args, **kwargs)

        return wrapped

    def transactions(self, function: Callable[[], Any]) -> Callable[[], Any]:
        @contextlib.contextmanager
        def wrapped() -> Iterator[Any]:
            self.point()
            with function() as session:
                yield session

        return wrapped


@dataclass
class World:
    settings: Settings
    db: Database
    store: Store
    jobs: MemoryJobs
    fuse: Fuse

    def submit(self, name: str = "entities", **options: Any) -> Run:
        options = {"resolve_data": resolve_data, "store": self.store, "db": self.db, "jobs": self.jobs} | options
        return submission.submit(options.pop("spec", spec(name)), settings=self.settings, **options)

    def kwargs(self) -> dict[str, Any]:
        return {"settings": self.settings, "store": self.store, "db": self.db, "jobs": self.jobs}

    def reconcile(self, jobs: Any = ..., **options: Any) -> ReconcileReport:
        jobs = self.jobs if jobs is ... else jobs
        options = {"ray_address": self.settings.ray_address, "keys": Keys.of(self.settings)} | options
        return reconcile(self.db, self.store, jobs, **options)

    def run(self, reference: str = "entities") -> Run:
        return get_run(self.db, reference)

    def says_running(self, run: Run, metrics: int = 0) -> None:
        """What a job writes when it begins."""
        writer = EventWriter(self.store, run.id, run.attempt, "driver", interval=60)
        writer.emit("state", state="running")
        for step in range(metrics):
            writer.emit("metrics", step=step, loss=1.0 / (step + 1))
        writer.close()

    def says_result(self, run: Run, state: RunState, *, attempt: int | None = None, **fields: Any) -> None:
        """What a job writes last."""
        result = RunResult(attempt=attempt or run.attempt, state=state, finished_at=time.time(), **fields)
        self.store.write_json(result_path(run.id), result.model_dump(mode="json"))

    def succeeds(self, run: Run, directory: Path) -> None:
        """A whole successful job."""
        self.says_running(run, metrics=3)
        directory.mkdir(exist_ok=True)
        (directory / "adapter_config.json").write_text("{}")
        (directory / "provenance.json").write_text('{"seed": 0}')
        self.store.publish(adapter_path(DIGEST), directory, {"base_digest": "sha256:base", "rank": 8})
        self.says_result(run, RunState.SUCCEEDED, adapter=DIGEST, metrics={"train_loss": 0.5})
        self.jobs.jobs[run.submission_id].status = JobStatus.SUCCEEDED


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "state.db"
    open_database(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def new_world(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], World]]:
    monkeypatch.setattr(submission, "git_commit", lambda: "0" * 40)
    opened: list[Database] = []

    def build() -> World:
        home = tmp_path / f"home{len(opened)}"
        home.mkdir()
        shutil.copy(empty_database, home / "state.db")
        settings = Settings(home=home, database_url=None, store_url=None, ray_address=None)
        world = World(settings, open_database(settings.database), Store(settings.store), MemoryJobs(), Fuse())
        opened.append(world.db)
        for target, names in (
            (world.store, ("write", "read", "list", "exists")),
            (world.jobs, ("submit", "status", "stop")),
        ):
            for name in names:
                setattr(target, name, world.fuse.wrap(getattr(target, name)))
        for name in ("read", "write"):
            setattr(world.db, name, world.fuse.transactions(getattr(world.db, name)))
        return world

    yield build
    for db in opened:
        db.close()


@pytest.fixture
def world(new_world: Callable[[], World]) -> World:
    return new_world()


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let every lease that is held now expire."""
    offset = [0.0]
    monkeypatch.setattr(leases, "_now", lambda: time.time() + offset[0])

    def forward() -> None:
        offset[0] += 10 * leases.TTL

    return forward


@pytest.fixture
def killed_everywhere(new_world: Callable[[], World], pass_time: Callable[[], None]) -> Callable[..., Iterator[World]]:
    """Worlds in which `action` was killed at each of its points in turn, and time has passed since; the last one of
    them was not killed at all."""

    def worlds(prepare: Callable[[World], Any], action: Callable[[World, Any], Any]) -> Iterator[World]:
        for point in range(10_000):
            world = new_world()
            prepared = prepare(world)
            world.fuse.left = point
            try:
                action(world, prepared)
            except Killed:
                finished = False
            else:
                finished = True
            world.fuse.left, world.fuse.dead = None, False
            pass_time()
            yield world
            if finished:
                assert point > 5, "the fuse never burnt"
                return

    return worlds
