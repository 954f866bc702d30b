"""`adaptory up --engine vllm` on a real Ray Serve: the replica in vLLM's environment, gateway and controller in ours.

Two minutes on two idle cores, most of it starts.
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
import requests

from orchestrator.db import Database, open_database
from orchestrator.limits.quota import Quota
from orchestrator.modeling.base_model import BaseModel, materialize
from orchestrator.modeling.prompts import load_tokenizer, prompt_ids, render
from orchestrator.names import QualifiedName
from orchestrator.registry.importing import import_adapter
from orchestrator.registry.signing import Keys
from orchestrator.registry.versions import parse_reference
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import save_route
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.tenants.keys import create_key
from orchestrator.tenants.tenant import add_tenant

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ASKED = "Who signed agreement 7 in London?"
NAMES = ("all", "mixed", "wide", "vast")
"""Routes of the tenant, each to the adapter of that name; `vast` has a higher rank than vLLM is started for."""


@dataclass
class Endpoint:
    home: Path
    base: BaseModel
    digests: dict[str, str]
    key: str
    python: str
    url: str = ""

    def types(self, *words: str) -> subprocess.CompletedProcess[str]:
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}
        ours = {"ADAPTORY_HOME": str(self.home), "ADAPTORY_VLLM_PYTHON": self.python, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "orchestrator.cli", *words]
        return subprocess.run(command, env=outer | ours, capture_output=True, text=True, timeout=1200)

    def ask(self, model: str, **fields: Any) -> requests.Response:
        messages = [{"role": "user", "content": ASKED}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24} | fields
        headers = {"Authorization": f"Bearer {self.key}"}
        stream = bool(fields.get("stream"))
        return requests.post(f"{self.url}/chat/completions", json=body, headers=headers, timeout=300, stream=stream)

    def says(self, model: str) -> str:
        response = self.ask(model)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def endpoint(base: Path, adapters: dict[str, Path], vllm_python: str) -> Iterator[Endpoint]:
    home = Path(tempfile.mkdtemp(prefix="av", dir="/tmp"))
    settings = Settings(home=home, ray_address=None, store_url=None)
    model = materialize(str(base), cache=settings.cache)
    db = open_database(settings.database)
    add_tenant(db, "acme", Quota(), actor="test")
    digests = {name: _publish(settings, db, name, adapters[name], base) for name in NAMES}
    made = Endpoint(home, model, digests, create_key(db, "acme", "test", actor="test").secret, vllm_python)
    try:
        done = made.types("up", "--engine", "vllm", "--dtype", "float32", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        made.url = json.loads(done.stdout)["serving"]["url"]
        for name, digest in digests.items():
            route = QualifiedName("acme", name)
            config = parse_config(route, {"adapters": [{"adapter": f"acme/{name}@{digest}"}]})
            save_route(db, route, config, actor="test", expected=0)
        until(lambda: made.ask("acme/vast").status_code != 404)
        yield made
    finally:
        db.close()
        made.types("down", "--force")
        shutil.rmtree(home)


def _publish(settings: Settings, db: Database, name: str, directory: Path, base: Path) -> str:
    return import_adapter(
        db,
        Store(settings.store),
        directory,
        parse_reference(f"acme/{name}", "nobody"),
        keys=Keys.of(settings),
        actor="test",
        cache=settings.cache,
        max_rank=128,
        base=str(base),
    ).digest


def until(holds: Callable[[], bool], seconds: float = 500.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.5)


def test_vllm_answers_over_http_what_our_own_engine_says(endpoint: Endpoint, ours: Callable, greedy: Callable):
    tokenizer = load_tokenizer(endpoint.base.path)
    prompt = prompt_ids(tokenizer, render(tokenizer, [{"role": "user", "content": ASKED}]))
    names = (None, "all", "mixed", "wide")
    expected = {
        n: d.text for n, d in zip(names, ours([greedy(prompt, n, 24, ignore_end=False) for n in names]), strict=True)
    }
    assert len(set(expected.values())) == len(names)
    assert endpoint.says(endpoint.base.path.name) == expected[None]
    for name in names[1:]:
        assert endpoint.says(f"acme/{name}") == expected[name]
    stream = endpoint.ask("acme/all", stream=True)
    assert stream.headers["x-adaptory-adapter"] == endpoint.digests["all"]
    lines = [line.decode().removeprefix("data: ") for line in stream.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == expected["all"]


def test_an_adapter_of_too_high_a_rank_is_refused_and_the_others_go_on(endpoint: Endpoint):
    before = endpoint.says("acme/all")
    response = endpoint.ask("acme/vast")
    assert response.status_code == 424, response.text
    assert "rank" in response.text
    assert endpoint.says("acme/all") == before


@pytest.mark.parametrize("victim", ["engine", "replica"])
def test_what_is_killed_takes_the_rest_with_it_and_is_started_anew(endpoint: Endpoint, victim: str):
    before = endpoint.says("acme/all")
    processes = _engine_processes(endpoint)
    assert processes
    engine = next(process for process in processes if process.parent() not in processes)
    (engine if victim == "engine" else engine.parent()).kill()
    assert psutil.wait_procs(processes, timeout=60)[1] == [], "none holds the memory of what comes next"
    until(lambda: endpoint.ask("acme/all").status_code == 200)
    assert endpoint.says("acme/all") == before


def test_down_leaves_no_process_of_vllm(endpoint: Endpoint):
    processes = _engine_processes(endpoint)
    assert processes
    down = endpoint.types("down")
    assert down.returncode == 0, down.stdout + down.stderr
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def _engine_processes(endpoint: Endpoint) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "VLLM" in " ".join(process.cmdline()) and process.environ().get("ADAPTORY_HOME") == str(endpoint.home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
