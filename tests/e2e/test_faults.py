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
import torch
import yaml
from safetensors.torch import load_file

from cluster import local
from cluster.processes import members
from orchestrator.settings import Settings
from orchestrator.store import Store, adapter_path, checkpoints_path, result_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0
"""Seconds to wait for what takes a few on a quiet machine."""
LOOK = 0.2
"""Seconds between looks at files."""
ASK = 2.0
"""Seconds between commands, each a second's work that the run beside it lacks."""
STEPS = 240
"""Of a run that is still under way when a command that was typed after its first checkpoint comes to it."""
TWO: dict[str, Any] = {"train": {"dtype": "float32", "max_steps": 60}, "resources": {"workers": 2}}
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

    def run(self, name: str, **environment: str) -> dict[str, Any]:
        return self.json("runs", "show", name, **environment)

    def waits(self, what: Callable[[], Any], until: str, every: float = LOOK) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(every)
        raise AssertionError(f"waited in vain for {until}")

    def waits_for_the_end(self, name: str, **environment: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            run = self.run(name, **environment)
            return run if run["state"] in ("succeeded", "failed", "cancelled", "paused") else None

        return self.waits(ended, f"the end of {name}", ASK)

    def waits_for_a_checkpoint(self, run: dict[str, Any], store: Store | None = None) -> None:
        store = store or Store(str(self.home / "store"))
        self.waits(lambda: store.children(checkpoints_path(run["id"])), f"a checkpoint of {run['name']}")

    def steps(self, name: str) -> dict[int, float]:
        """The loss of each step; of one that was taken twice, the last."""
        lines = self.types("runs", "events", name, "--json").stdout.splitlines()
        events = [json.loads(line)["data"] for line in lines]
        return {data["step"]: data["loss"] for data in events if "loss" in data}

    def adapter(self, run: dict[str, Any]) -> dict[str, torch.Tensor]:
        with tempfile.TemporaryDirectory() as directory:
            Store(str(self.home / "store")).fetch(adapter_path(run["adapter"]), Path(directory))
            return load_file(Path(directory) / "adapter_model.safetensors")

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
    up = one.types("up", "--no-serve", **keys)
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
    run = person.submits("cancelled", train={"max_steps": 100_000, "epochs": 10_000})
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


@pytest.fixture(scope="module")
def two(person: Person) -> dict[str, Any]:
    """A run of two workers that nothing disturbs: Ray Train, gloo and ZeRO 2 in fp32."""
    person.submits("two", **TWO)
    run = person.waits_for_the_end("two")
    assert run["state"] == "succeeded", run["error"]
    return run


def test_two_workers_share_a_run(person: Person, two: dict[str, Any]) -> None:
    """The losses are those of one worker within 1e-3."""
    person.submits("alone", train=TWO["train"])
    one = person.waits_for_the_end("alone")
    assert two["adapter"]
    for name in ("validation_loss", "train_loss"):
        assert two["result"]["metrics"][name] == pytest.approx(one["result"]["metrics"][name], abs=1e-3)
    assert two["result"]["metrics"]["tokens"] == one["result"]["metrics"]["tokens"]


def test_a_killed_worker_of_two_takes_its_group_along_and_nothing_is_lost(person: Person, two: dict[str, Any]) -> None:
    """Losses and weights are within 1e-5 of an undisturbed run's, which leaves room for another order of sums only; a row skipped
    or repeated changes the third digit."""
    run = person.submits("two-killed", **TWO)
    person.waits_for_a_checkpoint(run)
    workers = person.workers()
    assert len(workers) == 2
    workers[1].kill()
    run = person.waits_for_the_end("two-killed")
    assert (run["state"], run["attempt"]) == ("succeeded", 1), run["error"]
    said = person.types("runs", "events", "two-killed").stdout
    assert said.count("Going on from the checkpoint") == 1
    expected, losses = person.steps("two"), person.steps("two-killed")
    assert losses.keys() == expected.keys() == set(range(1, 61))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert run["result"]["metrics"]["tokens"] == two["result"]["metrics"]["tokens"]
    weights = person.adapter(run)
    for name, value in person.adapter(two).items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5)


def test_a_disk_that_stays_full_fails_the_run_with_what_to_do(person: Person, small_disk: Any) -> None:
    """Not even the result can be written: it reaches the person through what Ray keeps of the job's words."""
    environment = {"ADAPTORY_STORE_URL": str(small_disk.path / "store")}
    store = Store(environment["ADAPTORY_STORE_URL"])
    run = person.submits("full", environment)
    person.waits_for_a_checkpoint(run, store)

    def ended_on_a_full_disk() -> dict[str, Any] | None:
        small_disk.fill()  # again and again: what the job itself gives up must not make room
        run = person.run("full", **environment)
        return run if run["state"] != "running" else None

    run = person.waits(ended_on_a_full_disk, "the end of full")
    assert run["state"] == "failed"
    assert not store.exists(result_path(run["id"]))
    assert run["error"]["code"] == "disk_full"
    shown = " ".join(person.types("runs", "show", "full", **environment).stdout.split())
    assert f"There is no room for {small_disk.path}/store/adapters/" in shown
    assert "of the disk's 16.0 MiB are free" in shown
    assert "Free some space there" in shown
    assert "Traceback" not in shown
    left = store.children(checkpoints_path(run["id"]))
    assert any(store.manifest(f"{checkpoints_path(run['id'])}/{name}") for name in left)
    small_disk.free()
    done = person.types("runs", "resume", "full", **environment)
    assert done.returncode == 0, done.stderr
    run = person.waits_for_the_end("full", **environment)
    assert (run["state"], run["attempt"]) == ("succeeded", 2), run["error"]


def test_a_run_that_keeps_everything_in_s3(person: Person, s3: str) -> None:
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")} | {
        "ADAPTORY_STORE_URL": s3
    }
    person.submits("in-s3", environment, train={"max_steps": 6, "dtype": "float32"})
    run = person.waits_for_the_end("in-s3", **environment)
    assert run["state"] == "succeeded", run["error"]
    verified = person.types("adapters", "verify", run["adapter"], **environment)
    assert verified.returncode == 0, verified.stderr
    assert len(Store(s3).children(checkpoints_path(run["id"]))) >= 1
