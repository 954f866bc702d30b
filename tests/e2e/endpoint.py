"""What the tests of serving share: a home with two tenants, an adapter each, and their endpoint on a real Ray Serve."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import torch

from cluster import connect_if_running
from orchestrator.commands import serving as commands
from orchestrator.db import Database, open_database
from orchestrator.db.models import AdapterRow
from orchestrator.limits.quota import Quota
from orchestrator.modeling.adapter_files import AdapterConfig, adapter_digest, write_adapter
from orchestrator.modeling.base_model import BaseModel, materialize
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.prompts import end_tokens, load_tokenizer, prompt_ids, render
from orchestrator.names import QualifiedName
from orchestrator.registry.signing import Keys
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import save_route
from orchestrator.settings import Settings
from orchestrator.store import Store, adapter_path
from orchestrator.tenants.keys import create_key
from orchestrator.tenants.tenant import add_tenant
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
    base: BaseModel
    db: Database
    digests: dict[str, str]
    """Of each tenant's adapter, which its route `intents` leads to."""
    directories: dict[str, Path]
    """Of each adapter's files, by digest."""
    keys: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    """What `adaptory up` printed."""

    @property
    def url(self) -> str:
        return self.facts["serving"]["url"]

    @functools.cached_property
    def port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    @property
    def base_name(self) -> str:
        return self.base.path.name

    @property
    def settings(self) -> Settings:
        return Settings(home=self.home, ray_address=None, store_url=None)

    def types(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}
        ours = {"ADAPTORY_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "orchestrator.cli", *words]
        return subprocess.run(command, env=outer | ours | environment, capture_output=True, text=True, timeout=PATIENCE)

    def up(self, *words: str) -> None:
        done = self.types("up", *words, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        self.facts |= json.loads(done.stdout)

    def deploy(self, *models: dict[str, Any], **plan: Any) -> None:
        """What `up` does once Ray runs, with a whole `serving.app.Plan`."""
        client = connect_if_running(self.settings)
        assert client is not None
        commands.metrics_key(self.settings)
        keys = [Keys.of(self.settings).public().decode()]
        whole = {
            "port": self.port,
            "trusted_keys": keys,
            "dtype": "float32",
            "threads": 1,
            "models": list(models),
        } | plan
        application = commands.deploy(client, self.settings, Store(self.settings.store), whole)
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

    def route(self, tenant: str, revision: int, name: str = "intents", **config: Any) -> None:
        public = QualifiedName(tenant, name)
        save_route(self.db, public, parse_config(public, config), actor="test", expected=revision)

    def register(self, tenant: str, name: str, digest: str) -> None:
        with self.db.write() as session:
            session.add(
                AdapterRow(
                    tenant=tenant,
                    digest=digest,
                    name=name,
                    run_id="none",
                    base_digest=self.base.digest,
                    rank=4,
                    created_at=time.time(),
                    metrics={},
                    provenance={"base_model": {"reference": self.base.reference, "digest": self.base.digest}},
                )
            )

    def metrics(self) -> str:
        key = (self.home / "keys" / "metrics_key").read_text().strip()
        url = self.url.removesuffix("/v1") + "/metrics"
        return requests.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=30).text

    def gauge(self, name: str, label: str = "") -> float:
        """The sum of all samples of a metric that have this label."""
        lines = [line for line in self.metrics().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if label in line)

    def engine(self, adapter: str | None) -> tuple[EngineCore, tuple[int, ...]]:
        """The same engine in this process, with that adapter in it, and the tokens of the question."""
        tokenizer = load_tokenizer(self.base.path)
        network = ServedNetwork(load_model(self.base.path, dtype=torch.float32).eval())
        core = EngineCore(network, tokenizer, end_tokens(tokenizer), Limits(cache_tokens=20_000, max_length=512))
        if adapter is not None:
            core.load(adapter, self.directories[adapter])
        text = render(tokenizer, [{"role": "user", "content": ASKED}])
        return core, tuple(prompt_ids(tokenizer, text))

    def alone(self, adapter: str | None, **sampling: Any) -> str:
        """What it says to the question when nobody else asks."""
        core, ids = self.engine(adapter)
        core.add(GenerateRequest(ids, adapter, Sampling(**{"max_tokens": 24} | sampling)))
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


@contextlib.contextmanager
def prepared(directory: Path) -> Iterator[Endpoint]:
    """A fresh home where nothing runs yet; ended with all that was started in it.

    Args:
        directory: of the base model.
    """
    home = Path(tempfile.mkdtemp(prefix="as", dir="/tmp"))
    settings = Settings(home=home, ray_address=None, store_url=None)
    db = open_database(settings.database)
    made = Endpoint(home, materialize(str(directory), cache=settings.cache), db, {}, {}, {})
    try:
        for number, tenant in enumerate(TENANTS):
            add_tenant(db, tenant, Quota(), actor="test")
            made.keys[tenant] = create_key(db, tenant, "test", actor="test").secret
            files = home / f"trained-{tenant}"
            digest = publish(Store(settings.store), files, made.base, seed=number + 1)
            made.digests[tenant], made.directories[digest] = digest, files
            made.register(tenant, "intents", digest)
            made.route(tenant, 0, adapters=[{"adapter": f"{tenant}/intents@{digest}"}])
        yield made
    finally:
        db.close()
        made.types("down", "--force")
        shutil.rmtree(home)


def publish(store: Store, directory: Path, base: BaseModel, seed: int) -> str:
    """An adapter of rank 4 that says something else than its base."""
    write_random(directory, base, seed)
    digest = adapter_digest(directory, base.digest)
    put(store, directory, digest, base.digest)
    return digest


def put(store: Store, directory: Path, digest: str, base_digest: str) -> None:
    """Signed by the home that the store is in, as `adaptory adapters import` would."""
    Keys.of(Settings(home=Path(store.url).parent, ray_address=None, store_url=None)).sign(directory)
    store.publish(adapter_path(digest), directory, {"kind": "lora", "rank": 4, "base_digest": base_digest})


def write_random(directory: Path, base: BaseModel, seed: int, rank: int = 4) -> None:
    network = ServedNetwork(load_model(base.path, dtype=torch.float32).eval())
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, place in sorted(network.places.items()):
        if module.endswith(("q_proj", "down_proj")):
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, place.in_features, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(place.out_features, rank, generator=generator)
    write_adapter(directory, AdapterConfig(rank, 2.0 * rank, ("q_proj", "down_proj")), tensors)


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
