"""What the tests of serving share: an endpoint on a real Ray Serve, its adapters, and what they say."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch

from cluster import connect_if_running
from orchestrator.commands import serving as commands
from orchestrator.db import Database
from orchestrator.modeling.adapter_files import AdapterConfig, write_adapter
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.prompts import end_tokens, load_tokenizer, prompt_ids, render
from orchestrator.names import QualifiedName
from orchestrator.registry.importing import import_adapter
from orchestrator.registry.signing import Keys
from orchestrator.registry.versions import AdapterVersion, parse_reference
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import save_route
from orchestrator.settings import Settings
from orchestrator.store import Store, adapter_path
from serving.engine.core import EngineCore, answers
from serving.engine.network import ServedNetwork
from serving.engine.protocol import FinishReason, GenerateRequest, Sampling
from serving.engine.scheduler import Limits

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400.0
TENANTS = ("acme", "globex")
ASKED = "Who signed agreement 7 in London?"


@dataclass
class Endpoint:
    home: Path
    settings: Settings
    base: Path
    db: Database
    digests: dict[str, str]
    directories: dict[str, Path]
    keys: dict[str, str]
    facts: dict[str, Any]
    """What `adaptory up` printed."""

    @property
    def url(self) -> str:
        return self.facts["serving"]["url"]

    @property
    def base_name(self) -> str:
        return self.base.name

    def types(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return types(self.home, *words, **environment)

    @functools.cached_property
    def port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    def deploy(self, *models: dict[str, Any], **plan: Any) -> None:
        """What `up` does once Ray runs, with a whole `serving.plan.Plan`."""
        client = connect_if_running(self.settings)
        assert client is not None
        commands.metrics_key(self.settings)
        trusted = [key.decode() for key in Keys.of(self.settings).trust().keys]
        whole = {"port": self.port, "dtype": "float32", "threads": 1, "models": list(models), "trusted_keys": trusted}
        application = commands.deploy(client, self.settings, Store(self.settings.store), whole | plan)
        self.facts["serving"] = {"url": application.url}

    def ask(self, tenant: str, model: str | None = None, **fields: Any) -> requests.Response:
        body = {
            "model": model or f"{tenant}/intents",
            "messages": [{"role": "user", "content": ASKED}],
            "temperature": 0,
            "max_tokens": 24,
        }
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return requests.post(
            f"{self.url}/chat/completions",
            json=body | fields,
            headers=headers,
            timeout=120,
            stream=bool(fields.get("stream")),
        )

    def route(self, model: str, revision: int, **config: Any) -> None:
        name = QualifiedName.parse(model)
        save_route(self.db, name, parse_config(name, config), actor="test", expected=revision)

    def publish(self, reference: str, seed: int) -> AdapterVersion:
        """Another adapter as the next version of that name: what `adaptory adapters import` does, without its start."""
        files = train(self.home / f"trained-{seed}", self.base, seed)
        version = publish(self.settings, self.db, files, reference)
        self.directories[version.digest] = files
        return version

    def shelf(self, digest: str) -> Path:
        """Where it lies in the store."""
        return self.home / "store" / adapter_path(digest)

    def metrics(self) -> str:
        key = (self.home / "keys" / "metrics_key").read_text().strip()
        url = self.url.removesuffix("/v1") + "/metrics"
        return requests.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=30).text

    def gauge(self, name: str, label: str = "") -> float:
        return gauge(self.metrics(), name, label)

    def engine(self, adapter: str | None) -> tuple[EngineCore, tuple[int, ...]]:
        """The same engine in this process, with that adapter in it, and the tokens of the question."""
        tokenizer = load_tokenizer(self.base)
        network = ServedNetwork(load_model(self.base, dtype=torch.float32).eval())
        core = EngineCore(network, tokenizer, end_tokens(tokenizer), Limits(cache_tokens=20_000, max_length=512))
        if adapter is not None:
            core.load(adapter, self.directories[adapter])
        text = render(tokenizer, [{"role": "user", "content": ASKED}])
        return core, tuple(prompt_ids(tokenizer, text))

    def alone(self, adapter: str | None) -> str:
        """What it says to the question when nobody else asks."""
        core, ids = self.engine(adapter)
        core.add(GenerateRequest(ids, adapter, Sampling(max_tokens=24)))
        return "".join(delivery.event.text for delivery in answers(core) if delivery.event)

    def long_answers(self, tenant: str, tokens: int, count: int) -> dict[int, str]:
        """Seeds with which the tenant's adapter does not end its turn before so many tokens, at temperature 1, and what
        it says."""
        digest, seeds = self.digests[tenant], range(10 * count)
        core, ids = self.engine(digest)
        for seed in seeds:
            sampling = Sampling(max_tokens=tokens, temperature=1.0, seed=seed)
            core.add(GenerateRequest(ids, digest, sampling, id=str(seed)))
        texts, long = dict.fromkeys(seeds, ""), []
        for delivery in answers(core):
            assert delivery.event is not None
            texts[int(delivery.request_id)] += delivery.event.text
            if delivery.event.finish is FinishReason.LENGTH:
                long.append(int(delivery.request_id))
        assert len(long) >= count
        return {seed: texts[seed] for seed in sorted(long)[:count]}


def types(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    ours = {"ADAPTORY_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    return subprocess.run(command, env=outer | ours | environment, capture_output=True, text=True, timeout=PATIENCE)


def train(directory: Path, base: Path, seed: int, rank: int = 4) -> Path:
    """An adapter that says something else than its base."""
    network = ServedNetwork(load_model(base, dtype=torch.float32).eval())
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, place in sorted(network.places.items()):
        if module.endswith(("q_proj", "down_proj")):
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, place.in_features, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(place.out_features, rank, generator=generator)
    write_adapter(directory, AdapterConfig(rank, 2.0 * rank, ("q_proj", "down_proj"), base_model=str(base)), tensors)
    return directory


def publish(settings: Settings, db: Database, files: Path, reference: str, keys: Keys | None = None) -> AdapterVersion:
    """
    Args:
        keys: who signs it; None: this home.
    """
    return import_adapter(
        db,
        Store(settings.store),
        files,
        parse_reference(reference, "nobody"),
        keys=keys or Keys.of(settings),
        actor="test",
        cache=settings.cache,
        max_rank=256,
    )


def streamed(response: requests.Response) -> str:
    lines = [line.decode().removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def until(holds: Callable[[], bool], seconds: float = 20.0) -> float:
    """Seconds until it held."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, "it did not come to that"
        time.sleep(0.05)
    return time.monotonic() - start


def gauge(text: str, name: str, label: str = "") -> float:
    """The sum of all samples that have this label."""
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")) and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
