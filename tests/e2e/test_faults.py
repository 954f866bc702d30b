"""What a person does and what goes wrong, on a real local Ray: `adaptory up`, runs of a tiny model, `adaptory down`.

Two to four minutes on two cores, most of it the starts of jobs. Every run reserves one CPU and has one thread, so that
two fit and equal digests mean equality to the last digit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import local
from cluster.processes import members
from orchestrator.settings import Settings
from orchestrator.store import Store, checkpoints_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0
"""Seconds to wait for what takes a few on a quiet machine."""
STEPS = 60
CLI = (sys.executable, "-m", "orchestrator.cli")


@dataclass
class Person:
    """Somebody at a terminal, with a home of their own and a local Ray."""

    home: Path
    specs: Path
    base: Path

    @property
    def settings(self) -> Settings:
        return Settings(home=self.home, ray_address=None, store_url=None)

    def types(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}
        ours = {"ADAPTORY_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*CLI, *words],
            env=outer | ours | environment,
            cwd=self.specs,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def json(self, *words: str, **environment: str) -> Any:
        done = self.types(*words, "--json", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def submits(self, name: str, environment: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
        """`adaptory run`: it ends while the run goes on."""
        spec: dict[str, Any] = {
            "name": name,
            "base_model": str(self.base),
            "data": {"train": str(self.specs / "train.jsonl"), "validation": 0.1},
            "train": {
                "epochs": 1000,
                "max_steps": STEPS,
                "batch_size": 8,
                "learning_rate": 2.0e-3,
                "micro_batch_tokens": 512,
                "checkpoint": {"every": 5},
            },
            "resources": {"cpus_per_worker": 1},
        }
        for section, fields in changes.items():
            spec[section] = spec.get(section, {}) | fields
        path = self.specs / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        return self.json("run", str(path), **environment or {})

    def run(self, name: str) -> dict[str, Any]:
        return self.json("runs", "show", name)

    def waits(self, what: Callable[[], Any], until: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.2)
        raise AssertionError(f"waited in vain for {until}")

    def waits_for_the_end(self, name: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            run = self.run(name)
            return run if run["state"] in ("succeeded", "failed", "cancelled", "paused") else None

        return self.waits(ended, f"the end of {name}")

    def waits_for_a_checkpoint(self, run: dict[str, Any]) -> None:
        store = Store(str(self.home / "store"))
        self.waits(lambda: store.children(checkpoints_path(run["id"])), f"a checkpoint of {run['name']}")

    def workers(self) -> list[psutil.Process]:
        """Ray Train's workers of this head alone, whoever else runs Ray on this machine."""
        head = local.find(self.settings)
        assert head is not None
        found = []
        for process in members(head.id, head.session_dir):
            try:
                if any("RayTrainWorker" in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def person(
    tiny_model: Callable[[str], Path], entities_rows: list[dict[str, Any]], _s3_endpoint: str, tmp_path_factory: Any
) -> Iterator[Person]:
    """Ray's sockets are in the home, so its path is short; S3's credentials reach local jobs through the head."""
    home = Path(tempfile.mkdtemp(prefix="ad", dir="/tmp"))
    specs = tmp_path_factory.mktemp("specs")
    (specs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entities_rows), encoding="utf-8")
    one = Person(home, specs, tiny_model("llama"))
    keys = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    up = one.types("up", **keys)
    assert up.returncode == 0, up.stderr
    try:
        yield one
    finally:
        local.stop(one.settings)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(person: Person) -> str:
    """The digest that every disturbed run must end with."""
    person.submits("undisturbed")
    run = person.waits_for_the_end("undisturbed")
    assert run["state"] == "succeeded", run["error"]
    return run["adapter"]


def test_a_killed_worker_is_replaced_and_nothing_is_lost(person: Person, undisturbed: str) -> None:
    """`kill -9` after the first checkpoint; the submitting process has ended long before."""
    run = person.submits("killed")
    person.waits_for_a_checkpoint(run)
    (worker,) = person.workers()
    worker.kill()
    run = person.waits_for_the_end("killed")
    assert run["state"] == "succeeded", run["error"]
    assert run["adapter"] == undisturbed
    assert run["attempt"] == 1
    events = person.types("runs", "events", "killed", "--json").stdout.splitlines()
    said = [json.loads(line) for line in events]
    assert any("Going on from the checkpoint" in event["message"] for event in said)
    steps = [event["data"]["step"] for event in said if "loss" in event["data"]]
    assert set(steps) == set(range(1, STEPS + 1))


def test_a_paused_run_frees_the_cluster_and_goes_on_where_it_was(person: Person, undisturbed: str) -> None:
    run = person.submits("paused")
    person.waits_for_a_checkpoint(run)
    done = person.types("runs", "pause", "paused")
    assert done.returncode == 0, done.stderr
    run = person.run("paused")
    assert run["state"] == "paused"
    assert run["adapter"] is None
    assert person.workers() == []
    store = Store(str(person.home / "store"))
    assert 0 < int(store.children(checkpoints_path(run["id"]))[-1]) < STEPS
    done = person.types("runs", "resume", "paused")
    assert done.returncode == 0, done.stderr
    run = person.waits_for_the_end("paused")
    assert (run["state"], run["attempt"]) == ("succeeded", 2), run["error"]
    assert run["adapter"] == undisturbed


def test_cancelling_ends_the_job_and_frees_its_cpus(person: Person) -> None:
    run = person.submits("cancelled", train={"max_steps": 100_000, "epochs": 100_000})
    person.waits_for_a_checkpoint(run)
    assert len(person.workers()) == 1
    done = person.types("runs", "cancel", "cancelled")
    assert done.returncode == 0, done.stderr
    assert person.run("cancelled")["state"] == "cancelled"
    person.waits(lambda: not person.workers(), "the workers' end")
    assert person.run("cancelled")["adapter"] is None


def test_a_second_run_of_one_name_is_refused(person: Person, undisturbed: str) -> None:
    done = person.types("run", str(person.specs / "undisturbed.yaml"))
    assert done.returncode == 2
    assert "undisturbed" in done.stderr
    assert "Traceback" not in done.stderr
    assert person.run("undisturbed")["adapter"] == undisturbed


def test_two_workers_share_a_run(person: Person) -> None:
    """Ray Train, gloo and ZeRO 2 in fp32: the validation loss is that of one worker within 1e-3."""
    short = {"max_steps": 6, "dtype": "float32"}
    person.submits("alone", train=short)
    one = person.waits_for_the_end("alone")
    person.submits("together", train=short, resources={"workers": 2})
    two = person.waits_for_the_end("together")
    assert two["state"] == "succeeded", two["error"]
    assert two["adapter"]
    for name in ("validation_loss", "train_loss"):
        assert two["result"]["metrics"][name] == pytest.approx(one["result"]["metrics"][name], abs=1e-3)
    assert two["result"]["metrics"]["tokens"] == one["result"]["metrics"]["tokens"]


def test_a_run_that_keeps_everything_in_s3(person: Person, s3: str) -> None:
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")} | {
        "ADAPTORY_STORE_URL": s3
    }
    person.submits("in-s3", environment, train={"max_steps": 6, "dtype": "float32"})

    def ended() -> dict[str, Any] | None:
        run = person.json("runs", "show", "in-s3", **environment)
        return run if run["state"] in ("succeeded", "failed") else None

    run = person.waits(ended, "the end of in-s3")
    assert run["state"] == "succeeded", run["error"]
    verified = person.types("adapters", "verify", run["adapter"], **environment)
    assert verified.returncode == 0, verified.stderr
    assert len(Store(s3).children(checkpoints_path(run["id"]))) >= 1
