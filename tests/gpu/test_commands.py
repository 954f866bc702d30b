"""What a person types, where there is one GPU: a sweep trains on it while it serves, and the winner answers over HTTP."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml

from tests.e2e.endpoint import types, until

SCHEMA = {
    "type": "object",
    "properties": {"person": {"enum": ["Ada", "Alan"]}, "year": {"enum": [1936, 1952]}},
    "required": ["person", "year"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def typed() -> Iterator[Any]:
    """`typed("status")` → what the command says, in a home of its own."""
    home = Path(tempfile.mkdtemp(prefix="ag", dir="/tmp"))

    def typed(*words: str) -> Any:
        done = types(home, *words, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    try:
        yield typed
    finally:
        types(home, "down", "--force")
        shutil.rmtree(home)


def test_a_sweep_trains_on_the_gpu_that_serves_and_its_winner_answers(
    device: str, typed: Any, tiny_model: Any, entities_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    base, files = tiny_model("llama"), {}
    for name, rows in (("train", entities_rows[:36]), ("test", entities_rows[36:])):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    free = _free(device)
    up = typed("up", "--base", str(base))
    if device == "cuda":
        assert typed("status")["gpus"] == 1
        assert free - _free(device) > 100 * 2**20, "nobody else is on the GPU: the engine is not there either"
    spec = {
        "name": "sweep",
        "base_model": str(base),
        "data": {"train": str(files["train"]), "validation": 0.1, "test": str(files["test"])},
        "train": {"batch_size": 8, "schedule": "warmup_stable_decay"},
        "evaluate": {"metrics": ["json_valid", "entity_f1"], "max_new_tokens": 40},
        "sweep": {
            "search": {"learning_rate": {"choice": [1.0e-3, 5.0e-3]}, "epochs": {"choice": [2, 4]}},
            "trials": "all",
            "metric": "entity_f1",
        },
        "serve": {"route": "entities", "fallback": "base"},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec))
    typed("run", str(path))
    until(lambda: typed("runs", "show", "sweep")["state"] in ("succeeded", "failed", "cancelled"), 300)
    run = typed("runs", "show", "sweep")
    assert run["state"] == "succeeded", run
    adapter = run["result"]["adapter"]
    assert typed("adapters", "show", adapter)["provenance"]["hardware"]["device"] == device

    def ask(model: str, **fields: Any) -> requests.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Who signed?"}], "max_tokens": 60, **fields}
        headers = {"Authorization": f"Bearer {up['api_key']}"}
        return requests.post(f"{up['serving']['url']}/chat/completions", json=body, headers=headers, timeout=60)

    until(lambda: ask("default/entities").status_code == 200, 60)
    for schema in (None, {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}}):
        answer = ask("default/entities", **({"response_format": schema} if schema else {}))
        assert answer.status_code == 200, answer.text
        assert (answer.headers["x-adaptory-adapter"], answer.headers["x-adaptory-fallback"]) == (adapter, "false")
    said = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert said["person"] in ("Ada", "Alan")
    assert said["year"] in (1936, 1952)


def _free(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0
