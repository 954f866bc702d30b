"""The README's commands, typed as they stand and in their order: a fresh clone, an empty home, a real local Ray.

What takes minutes is made small, not left out: the clone's examples name a tiny base model and 40 rows on this machine, with as
many epochs at such a rate that the model learns their one answer, and take one CPU. The rest of them is the examples', so
`make demo` and each `adaptory run` train, evaluate and publish as they always do, and the demo reaches its goal. About three
minutes on two busy cores.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster import local
from orchestrator.settings import Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CLONED = ("cluster", "jobs", "orchestrator", "serving", "tests/bench")
CLONED_FILES = ("Makefile", "pyproject.toml", "constraints.txt")
PATIENCE = 400.0
"""Seconds for a command; the demo, which takes longest, took 35 to 70 on two busy cores."""

TESTS = "make test"
"""It runs this; tests/unit/test_project.py looks at it."""
MEASURES = "make bench NAME="
"""Up to half an hour each, and environments of their own: `make bench` must list them."""

STEERED = re.compile(r"adaptory runs (pause|resume|cancel) quick")
"""That run is small here and may be over before it is steered, which is then the answer; tests/e2e/test_faults.py steers runs
that go on for long."""


def commands() -> list[str]:
    """Every command of the README's console blocks, without its comment."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@dataclass
class Person:
    """Somebody at a terminal in a clone, with `.venv/bin` on the path."""

    clone: Path
    home: Path

    def types(self, command: str) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.clone,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def environment(self) -> dict[str, str]:
        ours = ("ADAPTORY_", "RAY_", "MAKE", "MFLAGS", "PYTHON")
        outside = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return outside | {
            "ADAPTORY_HOME": str(self.home),
            "PATH": f"{self.clone / '.venv/bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.clone),  # the `adaptory` of this environment would import another checkout
        }


@pytest.fixture
def person(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Iterator[Person]:
    """Ray's sockets are in the home, so its path is short."""
    clone, home = tmp_path / "adaptory", Path(tempfile.mkdtemp(prefix="ad", dir="/tmp"))
    for folder in CLONED:
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in CLONED_FILES:
        shutil.copy(ROOT / file, clone)
    for example in ("finance-entities", "finance-entities-sweep"):
        make_small(clone / f"jobs/examples/{example}.yaml", tmp_path, tiny_model("llama"))
    installed(clone / ".venv")
    try:
        yield Person(clone, home)
    finally:
        local.stop(Settings(home=home, ray_address=None))
        shutil.rmtree(home, ignore_errors=True)


def make_small(example: Path, directory: Path, base: Path) -> None:
    """The example with a base that is tiny, rows that differ in a number, and steps enough to learn their one answer."""
    rows = [
        {"role": "system", "content": "Extract the named entities as JSON."},
        {"role": "user", "content": "Ada Lovelace signed agreement {} in London."},
        {"role": "assistant", "content": '{"person": ["Ada Lovelace"]}'},
    ]
    for split, numbers in (("train", range(36)), ("test", range(36, 40))):
        chats = (
            {"messages": [row | {"content": row["content"].replace("{}", str(n))} for row in rows]} for n in numbers
        )
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    spec = yaml.safe_load(example.read_text())
    spec["base_model"] = str(base)
    spec["data"] |= {"train": str(directory / "train.jsonl"), "test": str(directory / "test.jsonl")}
    spec["train"] |= {"epochs": 20, "learning_rate": 1.0e-2}
    spec["resources"] = {"cpus_per_worker": 1}
    if "sweep" in spec:
        spec["sweep"]["search"] = {"learning_rate": {"choice": [1e-3, 1e-2]}, "epochs": {"choice": [5, 20]}}
    example.write_text(yaml.safe_dump(spec))


def installed(venv: Path) -> None:
    """This environment in the place where make would have installed it."""
    venv.mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith(".adaptory"):
            (venv / part.name).symlink_to(part)
    for goal in (".adaptory", ".adaptory-dev"):
        (venv / goal).touch()


def test_every_command_does_what_the_page_says(person: Person) -> None:
    printed = {}
    for command in commands():
        if command == TESTS or command.startswith(MEASURES):
            continue
        done = person.types(command)
        over = STEERED.fullmatch(command) and "Run quick has succeeded" in done.stderr
        assert done.returncode == (1 if over else 0), f"$ {command}\n{done.stdout}{done.stderr}"
        printed[command] = done.stdout
    demo = json.loads((person.clone / "build/demo.json").read_text())
    assert demo["after"]["entity_f1"] > 0.9
    assert demo["sweep"]["expected"] == 4
    assert len(list((person.clone / "build/demo").glob("*.png"))) == 4
    assert (person.clone / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((person.clone / "plots").glob("*.png"))) == 4
    assert (person.clone / "my-adapter/adapter_model.safetensors").is_file()
    assert (person.clone / "my-model/model.safetensors").is_file()
    assert "base_model" in json.loads((person.clone / "adaptory.schema.json").read_text())["properties"]
    listed = {line.split("  ")[0] for line in printed["make bench"].splitlines()}
    assert listed >= {command for command in commands() if command.startswith(MEASURES)}
    assert local.find(Settings(home=person.home, ray_address=None)) is None
