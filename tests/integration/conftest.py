"""Jobs on tiny models: a store with data and a resolved spec, run as a worker runs them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runs.result import RunResult
from orchestrator.spec.job import JobSpec
from orchestrator.spec.resolved import ResolvedSpec
from orchestrator.store import Store, adapter_path, spec_path
from tests.integration.sweep_process import EVALUATE, Running


class Killed(BaseException):
    """What ends a worker in the middle without any handling, in its own process."""


@dataclass
class Heard:
    """Stands for an EventWriter: remembers what was said, and may end the worker after a step."""

    kill_after: int | None = None
    then: dict[int, Callable[[], None]] = field(default_factory=dict)
    """By step: what happens once it was said."""
    lines: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def emit(self, type: str, message: str = "", **data: Any) -> None:
        self.lines.append((type, message, data))
        if type == "metrics" and "loss" in data:
            if data["step"] == self.kill_after:
                raise Killed
            self.then.get(data["step"], lambda: None)()

    def flush(self) -> None:
        """Everything is remembered at once."""

    @property
    def losses(self) -> list[float]:
        return [data["loss"] for type, _, data in self.lines if type == "metrics" and "loss" in data]

    @property
    def steps(self) -> list[int]:
        return [data["step"] for type, _, data in self.lines if type == "metrics" and "loss" in data]

    @property
    def messages(self) -> list[str]:
        return [message for type, message, _ in self.lines if type == "message"]


@dataclass
class Job:
    """A run that could be submitted: its spec and data are in the store."""

    store: Store
    cache: Path
    resolved: ResolvedSpec
    device: str = "cpu"

    def work(self, heard: Heard | None = None, attempt: int = 1) -> RunResult:
        """One attempt on one worker, in this process."""
        import torch

        from jobs.train.session import Session
        from jobs.train.setup import Place
        from jobs.train.worker import run_worker

        events: Any = heard or Heard()
        place = Place(device=torch.device(self.device))
        result = run_worker(Session(self.resolved, attempt, self.store, self.cache, place, events))
        assert result is not None
        return result

    def fetched(self, digest: str | None, directory: Path) -> Path:
        assert digest is not None
        self.store.fetch(adapter_path(digest), directory)
        return directory


@pytest.fixture
def make_job(
    tmp_path: Path, tiny_model: Callable[[str], Path], entities_rows: list[dict[str, Any]], device: str
) -> Callable[..., Job]:
    """`make_job(model="llama", name="one", store=URL, **sections)`: 32 rows to train on, 4 to validate, 12 to test.

    fp32, learning rate 5e-3, eight rows a step, two epochs (eight steps), a checkpoint every two steps.
    """
    from jobs.data import resolve

    train, validation, test = tmp_path / "train.jsonl", tmp_path / "validation.jsonl", tmp_path / "test.jsonl"
    for path, rows in ((train, entities_rows[:32]), (validation, entities_rows[32:36]), (test, entities_rows[36:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(model: str | Path = "llama", name: str = "one", store: str | None = None, **sections: Any) -> Job:
        settings: dict[str, Any] = {
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "dtype": "float32",
            "micro_batch_tokens": 512,
            "checkpoint": {"every": 2},
        }
        spec = JobSpec.model_validate(
            {
                "name": name,
                "base_model": str(model if isinstance(model, Path) else tiny_model(model)),
                "data": {"train": str(train), "validation": str(validation), "test": str(test)},
            }
            | sections
            | {"train": settings | sections.get("train", {})}
        )
        at = Store(store or str(tmp_path / "store"))
        resolved = ResolvedSpec(
            run=f"{name}-run",
            spec=spec,
            data=resolve(spec.data, store=at),
            base_model=spec.base_model,
            store_url=at.url,
            created_at=time.time(),
        )
        at.write_json(spec_path(resolved.run), resolved.model_dump(mode="json"))
        return Job(at, tmp_path / "cache", resolved, device)

    return make


@pytest.fixture
def heard() -> type[Heard]:
    return Heard


@pytest.fixture
def killed() -> type[Killed]:
    return Killed


@pytest.fixture
def start(ray_local: None, home: Path) -> Any:
    started: list[Running] = []

    def start(job: Any, attempt: int = 1) -> Running:
        started.append(Running(job, home, attempt))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.fixture
def by_answers(make_job: Any, entities_rows: Any, tmp_path: Path) -> Callable[..., Any]:
    """`by_answers(sweep)`: eight rows that a tiny model learns by heart within sixty steps, to train on, to choose by and to test."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in entities_rows[:8]), encoding="utf-8")
    data = dict.fromkeys(("train", "validation", "test"), str(rows))
    train = {"learning_rate": 1e-2, "warmup_steps": 2, "epochs": 60}
    lora = {"type": "lora", "rank": 16}
    return lambda sweep, **more: make_job(
        **{"sweep": sweep, "data": data, "train": train, "tuning": lora, "evaluate": EVALUATE} | more
    )
