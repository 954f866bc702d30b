"""Two tenants' adapters behind a real Ray Serve: `adaptory up`, OpenAI's API over HTTP, `adaptory chat`, `adaptory down`.

One to three minutes on two cores, most of it starts; everything that is asked takes a few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch

from orchestrator.db import Database, open_database
from orchestrator.db.audit import entries
from orchestrator.limits.quota import Quota
from orchestrator.modeling.adapter_files import AdapterConfig, write_adapter
from orchestrator.modeling.base_model import materialize
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.prompts import end_tokens, load_tokenizer, prompt_ids, render
from orchestrator.names import QualifiedName
from orchestrator.registry.importing import import_adapter
from orchestrator.registry.signing import SIGNATURE_FILE, Keys
from orchestrator.registry.versions import AdapterVersion, move_alias, parse_reference
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import delete_route, save_route
from orchestrator.runs.repository import list_events
from orchestrator.settings import Settings
from orchestrator.store import MANIFEST, Store, adapter_path, sha256_file
from orchestrator.tenants.keys import create_key
from orchestrator.tenants.tenant import add_tenant, disable_tenant, enable_tenant
from serving.adapter_router import RESIDENCY_SECONDS
from serving.engine.core import EngineCore, answers
from serving.engine.network import ServedNetwork
from serving.engine.protocol import FinishReason, GenerateRequest, Sampling
from serving.engine.scheduler import Limits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400.0
TENANTS = ("acme", "globex")
ASKED = "Who signed agreement 7 in London?"
STEPS = 150
LONG = 400
"""Tokens of an answer that takes the tiny model about a second."""


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
            timeout=60,
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


def types(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}
    ours = {"ADAPTORY_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    return subprocess.run(command, env=outer | ours | environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def endpoint(tiny_model: Callable[[str], Path]) -> Iterator[Endpoint]:
    """acme's adapter and route are made by the commands that a user types, globex's by the functions behind them."""
    home = Path(tempfile.mkdtemp(prefix="as", dir="/tmp"))
    settings = Settings(home=home, ray_address=None, store_url=None)
    directory = tiny_model("llama")
    base = materialize(str(directory), cache=settings.cache)
    db = open_database(settings.database)
    files = {tenant: train(home / f"trained-{tenant}", directory, seed) for seed, tenant in enumerate(TENANTS, 1)}

    def typed(*words: str) -> Any:
        done = types(home, *words, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    try:
        imported = typed("adapters", "import", str(files["acme"]), "--as", "acme/intents")
        typed("adapters", "promote", imported["reference"], "production")
        add_tenant(db, "globex", Quota(), actor="test")
        digests = {
            "acme": imported["digest"],
            "globex": publish(settings, db, files["globex"], "globex/intents").digest,
        }
        keys = {tenant: create_key(db, tenant, "test", actor="test").secret for tenant in TENANTS}
        facts = typed("up", "--dtype", "float32")
        typed("routes", "set", "acme/intents", "--adapter", "acme/intents@production", "--fallback", "previous")
        directories = {digests[tenant]: files[tenant] for tenant in TENANTS}
        made = Endpoint(home, settings, base.path, db, digests, directories, keys, facts)
        made.route("globex/intents", 0, adapters=[{"adapter": f"globex/intents@{digests['globex']}"}])
        until(lambda: all(made.ask(tenant).status_code == 200 for tenant in TENANTS))
        yield made
    finally:
        db.close()
        types(home, "down", "--force")
        shutil.rmtree(home)


def train(directory: Path, base: Path, seed: int) -> Path:
    """An adapter of rank 4 that says something else than its base."""
    network = ServedNetwork(load_model(base, dtype=torch.float32).eval())
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, place in sorted(network.places.items()):
        if module.endswith(("q_proj", "down_proj")):
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, place.in_features, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(place.out_features, 4, generator=generator)
    write_adapter(directory, AdapterConfig(4, 8.0, ("q_proj", "down_proj"), base_model=str(base)), tensors)
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
        max_rank=64,
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


def test_up_says_where_it_is_and_shows_the_first_key_once(endpoint: Endpoint):
    assert endpoint.url.startswith("http://127.0.0.1:")
    assert endpoint.facts["api_key"].startswith("ak-")
    again = endpoint.types("up", "--dtype", "float32", "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    facts = json.loads(again.stdout)
    assert facts["serving"]["url"] == endpoint.url
    assert "api_key" not in facts
    assert endpoint.facts["jobs"] == facts["jobs"] == []


def test_each_tenants_adapter_answers_as_the_engine_does_alone(endpoint: Endpoint):
    expected = {tenant: endpoint.alone(endpoint.digests[tenant]) for tenant in TENANTS} | {"base": endpoint.alone(None)}
    assert len(set(expected.values())) == 3
    for tenant in TENANTS:
        whole, stream = endpoint.ask(tenant), endpoint.ask(tenant, stream=True)
        assert whole.status_code == 200, whole.text
        assert whole.json()["choices"][0]["message"]["content"] == expected[tenant]
        assert streamed(stream) == expected[tenant]
        for response in (whole, stream):
            assert response.headers["x-adaptory-adapter"] == endpoint.digests[tenant]
            assert response.headers["x-adaptory-fallback"] == "false"
    base = endpoint.ask("acme", model=endpoint.base_name)
    assert base.json()["choices"][0]["message"]["content"] == expected["base"]


def test_one_request_id_on_every_answer(endpoint: Endpoint):
    for response in (endpoint.ask("acme"), endpoint.ask("acme", model="nothing")):
        assert response.headers["x-request-id"]
        assert "," not in response.headers["x-request-id"]  # requests joins several of one name


def test_another_tenants_model_does_not_exist(endpoint: Endpoint):
    theirs = endpoint.digests["globex"]
    for model in (
        *("globex/intents", "globex/intents@1", "globex/intents@production", f"globex/intents@{theirs}"),
        *("globex/nothing", f"acme/intents@{theirs}", "acme/intents@99", "acme/intents@staging"),
    ):
        response = endpoint.ask("acme", model=model)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found"), model
    assert requests.get(f"{endpoint.url}/models", timeout=30).status_code == 401


def test_one_version_by_number_alias_and_digest(endpoint: Endpoint):
    digest = endpoint.digests["acme"]
    expected = endpoint.alone(digest)
    for version in ("1", "production", digest):
        response = endpoint.ask("acme", model=f"acme/intents@{version}")
        assert response.status_code == 200, response.text
        assert response.headers["x-adaptory-adapter"] == digest
        assert response.json()["choices"][0]["message"]["content"] == expected


def test_a_changed_and_a_deleted_route_reach_the_gateway_within_two_seconds(endpoint: Endpoint):
    def status() -> int:
        return endpoint.ask("acme", model="acme/routed").status_code

    endpoint.route("acme/routed", 0, base_model=endpoint.base_name)
    assert until(lambda: status() == 200) < 2.0
    delete_route(endpoint.db, QualifiedName("acme", "routed"), actor="test")
    assert until(lambda: status() == 404) < 2.0


def test_a_disabled_tenants_keys_are_refused_at_once(endpoint: Endpoint):
    disable_tenant(endpoint.db, "globex", actor="test")
    refused = endpoint.ask("globex")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert endpoint.ask("acme").status_code == 200
    enable_tenant(endpoint.db, "globex", actor="test")
    assert endpoint.ask("globex").status_code == 200


def test_a_promotion_moves_the_answers_over_and_drops_no_request(endpoint: Endpoint):
    """Three clients ask without a pause, one of them streaming, while `adaptory adapters promote` moves the alias to
    another version and back. Every answer is wholly the old version's or the new one's, and two seconds after the move there
    are only new ones."""
    old, new = endpoint.digests["acme"], endpoint.publish("acme/intents", seed=21)
    texts = {digest: endpoint.alone(digest) for digest in (old, new.digest)}
    seen: list[tuple[float, str, str]] = []
    failed: list[str] = []
    done = threading.Event()

    def client(stream: bool) -> None:
        while not done.is_set():
            began = time.time()
            response = endpoint.ask("acme", stream=stream)
            if response.status_code != 200 or response.headers["x-adaptory-fallback"] != "false":
                failed.append(f"{response.status_code} {dict(response.headers)}")
                continue
            text = streamed(response) if stream else response.json()["choices"][0]["message"]["content"]
            seen.append((began, response.headers["x-adaptory-adapter"], text))

    clients = [threading.Thread(target=client, args=(number == 0,)) for number in range(3)]
    for each in clients:
        each.start()
    try:
        for reference in (new.reference, "acme/intents@1"):
            moved = endpoint.types("adapters", "promote", reference, "production", "--json")
            assert json.loads(moved.stdout)["moved"], moved.stdout + moved.stderr
            time.sleep(3.0)
    finally:
        done.set()
        for each in clients:
            each.join()
    assert failed == []
    back, forth = (entry.created_at for entry in entries(endpoint.db, subject="acme/intents@production", limit=2))
    for began, digest, text in seen:
        assert text == texts[digest]
        if began < forth or began > back + 2.0:
            assert digest == old
        elif forth + 2.0 < began < back:
            assert digest == new.digest
    assert {digest for _, digest, _ in seen} == {old, new.digest}
    until(lambda: endpoint.ask("acme").headers["x-adaptory-adapter"] == old)


def test_what_an_alias_comes_to_is_fetched_before_anybody_asks(endpoint: Endpoint):
    first, second = endpoint.publish("acme/ahead", seed=31), endpoint.publish("acme/ahead", seed=32)

    def held() -> float:
        return _gauge(endpoint.metrics(), "adaptory_engine_adapter_bytes")

    before, size = held(), 0.0
    move_alias(endpoint.db, first, "production", actor="test")
    endpoint.route("acme/ahead", 0, adapters=[{"adapter": "acme/ahead@production"}])
    until(lambda: held() > before)
    before, size = held(), held() - before
    move_alias(endpoint.db, second, "production", actor="test")
    until(lambda: held() == before + size)
    cold = _gauge(endpoint.metrics(), "adaptory_engine_cold_loads")
    assert endpoint.ask("acme", model="acme/ahead").headers["x-adaptory-adapter"] == second.digest
    time.sleep(2 * RESIDENCY_SECONDS)
    assert _gauge(endpoint.metrics(), "adaptory_engine_cold_loads") == cold


def test_clients_that_go_away_have_their_answers_aborted(endpoint: Endpoint):
    """Eight that are known to be long are left at their first words. The engine counts the tokens of answers that ended:
    had one gone on, it would be among them."""
    seeds = long_answers(endpoint, 8)
    counted = _gauge(endpoint.metrics(), "adaptory_engine_completion_tokens")
    assert counted > 0.0
    left = _gauge(endpoint.metrics(), "adaptory_requests_total", 'status="499"')
    asked = [endpoint.ask("acme", stream=True, temperature=1.0, seed=seed, max_tokens=LONG) for seed in seeds]
    for response in asked:
        response.close()
    until(lambda: _gauge(endpoint.metrics(), "adaptory_requests_total", 'status="499"') == left + 8)
    until(lambda: _gauge(endpoint.metrics(), "adaptory_engine_running") == 0.0)
    time.sleep(2 * RESIDENCY_SECONDS)
    assert _gauge(endpoint.metrics(), "adaptory_engine_completion_tokens") == counted
    assert _gauge(endpoint.metrics(), "adaptory_in_flight") == 0.0


def long_answers(endpoint: Endpoint, count: int) -> list[int]:
    """Seeds with which the model does not end its turn before `LONG` tokens."""
    seeds = list(range(10 * count))
    core, ids = endpoint.engine(endpoint.digests["acme"])
    for seed in seeds:
        sampling = Sampling(max_tokens=LONG, temperature=1.0, seed=seed)
        core.add(GenerateRequest(ids, endpoint.digests["acme"], sampling, id=str(seed)))
    events = {delivery.request_id: delivery.event for delivery in answers(core) if delivery.last}
    found = [seed for seed in seeds if events[str(seed)].finish is FinishReason.LENGTH]
    assert len(found) >= count
    return found[:count]


def _gauge(text: str, name: str, label: str = "") -> float:
    """The sum of all samples that have this label."""
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")) and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def unsigned(endpoint: Endpoint) -> AdapterVersion:
    """As if it had been published before adapters were signed."""
    version = endpoint.publish("acme/unsigned", seed=71)
    manifest = json.loads((endpoint.shelf(version.digest) / MANIFEST).read_text())
    del manifest["files"][SIGNATURE_FILE]
    (endpoint.shelf(version.digest) / MANIFEST).write_text(json.dumps(manifest))
    return version


def foreign(endpoint: Endpoint) -> AdapterVersion:
    """Signed by somebody who can write to the store, and is not trusted."""
    files = train(endpoint.home / "trained-72", endpoint.base, 72)
    keys = Keys(endpoint.home / "foreign" / "signing.pem", own=True)
    return publish(endpoint.settings, endpoint.db, files, "acme/foreign", keys)


def tampered(endpoint: Endpoint) -> AdapterVersion:
    """A byte of its configuration is another, and the manifest was made to fit."""
    version = endpoint.publish("acme/tampered", seed=73)
    shelf = endpoint.shelf(version.digest)
    file = shelf / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    manifest = json.loads((shelf / MANIFEST).read_text())
    manifest["files"][file.name].update(size=file.stat().st_size, sha256=sha256_file(file))
    (shelf / MANIFEST).write_text(json.dumps(manifest))
    return version


def damaged(endpoint: Endpoint) -> AdapterVersion:
    version = endpoint.publish("acme/damaged", seed=74)
    weights = endpoint.shelf(version.digest) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    return version


@pytest.mark.parametrize(
    ("make", "check"),
    [(unsigned, "signature"), (foreign, "signature"), (tampered, "signature"), (damaged, "bytes")],
)
def test_what_nobody_trusted_has_signed_is_refused_by_name(
    endpoint: Endpoint, make: Callable[[Endpoint], AdapterVersion], check: str
):
    version = make(endpoint)
    refused = endpoint.ask("acme", model=version.reference)
    assert refused.status_code == 424, refused.text
    assert refused.headers["x-adaptory-check"] == check
    error = refused.json()["error"]
    assert error["code"] == ("signature_invalid" if check == "signature" else "invalid_adapter")
    assert version.digest in error["message"]
    assert str(endpoint.home) not in error["message"]


def test_who_stands_in_for_a_damaged_adapter_is_what_the_route_says(endpoint: Endpoint):
    """Nobody, if it says nothing; the base; or the version that the alias named before."""
    good, bad = endpoint.publish("acme/fallen", seed=81), endpoint.publish("acme/fallen", seed=82)
    for version in (good, bad):
        move_alias(endpoint.db, version, "production", actor="test")
    (endpoint.shelf(bad.digest) / "adapter_model.safetensors").write_bytes(b"")
    for revision, (fallback, status, answering) in enumerate(
        (([], 424, None), (["base"], 200, "none"), (["previous", "base"], 200, good.digest))
    ):
        arms = [{"adapter": "acme/fallen@production"}]
        endpoint.route("acme/fallen", revision, adapters=arms, fallback=fallback)
        time.sleep(2)
        response = endpoint.ask("acme", model="acme/fallen")
        assert response.status_code == status, response.text
        assert response.headers.get("x-adaptory-adapter") == answering
        assert response.headers.get("x-adaptory-fallback") == (None if answering is None else "true")


def test_usage_reaches_the_database(endpoint: Endpoint):
    from orchestrator.tenants.usage import report

    def used() -> int:
        return sum(row["tokens_out"] for row in report(endpoint.db, tenant="globex"))

    before = used()
    endpoint.ask("globex")
    until(lambda: used() >= before + 1)


def test_chat_in_the_terminal(endpoint: Endpoint):
    done = endpoint.types("chat", "globex/intents", "--message", ASKED, "--temperature", "0", "--max-tokens", "24")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == endpoint.alone(endpoint.digests["globex"]).strip()
    refused = endpoint.types("chat", "globex/nothing", "--message", "x")
    assert refused.returncode == 1
    assert "does not exist" in refused.stderr


# --- replicas, jobs and the end: each of these leaves the application as the next one takes it --------------------------


def test_a_job_beside_the_server_has_all_its_cpus_and_answers_go_on(endpoint: Endpoint):
    spec = {
        "name": "beside",
        "base_model": str(endpoint.base),
        "data": {"train": str(endpoint.home / "train.jsonl"), "format": "text"},
        "train": {"epochs": 1000, "max_steps": STEPS, "batch_size": 8, "micro_batch_tokens": 512},
        "resources": {"cpus_per_worker": os.cpu_count()},
    }
    rows = [{"text": f"Row {number} of nothing in particular."} for number in range(32)]
    (endpoint.home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (endpoint.home / "beside.yaml").write_text(json.dumps(spec))
    submitted = endpoint.types("run", str(endpoint.home / "beside.yaml"), "--json")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    seen, priorities = set(), set()
    while (run := json.loads(endpoint.types("runs", "show", "beside", "--json").stdout))["state"] in _GOING:
        for _ in range(10):
            assert endpoint.ask("acme").status_code == 200
            priorities |= _training_priorities()
        seen.add(max((e.data.get("step", 0) for e in list_events(endpoint.db, run["id"])), default=0))
    assert run["state"] == "succeeded", run
    assert len(seen - {0, STEPS}) >= 1  # it made progress between answers
    assert priorities == {19}


_GOING = ("validating_files", "queued", "running")


def _training_priorities() -> set[int]:
    """Of the threads that have done the work of training workers on this machine: half a second of it or more."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                busiest = max(process.threads(), key=lambda thread: thread.user_time)
                if busiest.user_time > 0.5 and busiest.id != process.pid:
                    found.add(os.getpriority(os.PRIO_PROCESS, busiest.id))
    return found


def test_replicas_come_and_go_under_answers_of_which_none_is_cut(endpoint: Endpoint):
    (before,) = _engines(endpoint)
    seeds = long_answers(endpoint, 8)
    with ThreadPoolExecutor(16) as people:
        running = [people.submit(long_answer, endpoint, seed) for seed in seeds]
        changed = endpoint.types("up", "--dtype", "float32", "--replicas", "2", "--json")
        assert changed.returncode == 0, changed.stdout + changed.stderr
        assert {answer.result() for answer in running} == {"length"}
        until(lambda: len(_engines(endpoint)) == 2, PATIENCE)
        assert before in _engines(endpoint)
        base = endpoint.base_name
        running = [people.submit(long_answer, endpoint, seed, model=base) for seed in seeds]
        changed = endpoint.types("up", "--dtype", "float32", "--json")
        assert changed.returncode == 0, changed.stdout + changed.stderr
        while len(_engines(endpoint)) > 1:
            assert endpoint.ask("acme").status_code == 200
        assert {answer.result() for answer in running} <= {"length", "stop"}


def long_answer(endpoint: Endpoint, seed: int, **fields: Any) -> str:
    """Why it ended."""
    return _reason(endpoint.ask("acme", stream=True, temperature=1.0, seed=seed, max_tokens=LONG, **fields))


def _reason(response: requests.Response) -> str:
    lines = [line.decode().removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return json.loads(lines[-2])["choices"][0]["finish_reason"]


def _engines(endpoint: Endpoint) -> list[str]:
    """Names of the engine's replicas that run."""
    deployments = json.loads(endpoint.types("status", "--json").stdout)["serving"]["deployments"]
    (engine,) = (each for each in deployments if each["name"].startswith("engine-"))
    return [replica["id"] for replica in engine["replicas"] if replica["state"] == "RUNNING"]


def test_none_while_nobody_asks_and_the_first_to_ask_wait_for_the_start(endpoint: Endpoint):
    changed = endpoint.types("up", "--dtype", "float32", "--replicas", "0:2", "--idle", "3", "--json")
    assert changed.returncode == 0, changed.stdout + changed.stderr
    until(lambda: not _engines(endpoint), PATIENCE)
    assert "none while nobody asks" in endpoint.types("status").stdout
    with ThreadPoolExecutor(4) as people:
        answers = [people.submit(endpoint.ask, tenant, stream=stream) for tenant in TENANTS for stream in (False, True)]
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert len(_engines(endpoint)) == 1
    until(lambda: not _engines(endpoint), PATIENCE)  # and again


def test_status(endpoint: Endpoint):
    endpoint.ask("acme")
    status = json.loads(endpoint.types("status", "--json").stdout)
    assert status["serving"]["status"] == "RUNNING"
    assert status["cpus"] == os.cpu_count()
    (engine,) = (each for each in status["serving"]["deployments"] if each["name"].startswith("engine-"))
    assert engine["model"] == endpoint.base_name
    until(lambda: "1 adapters" in endpoint.types("status").stdout)


def test_down_answers_what_it_had_begun_refuses_the_rest_and_loses_no_usage(endpoint: Endpoint):
    from orchestrator.tenants.usage import report
    from serving.app import USAGE_SECONDS

    def used() -> int:
        return sum(row["requests"] for row in report(endpoint.db, tenant="acme"))

    seeds = long_answers(endpoint, 6)
    time.sleep(USAGE_SECONDS + 1)
    stored = used()
    with ThreadPoolExecutor(7) as people:
        running = [people.submit(_asks_until_refused, endpoint, seed) for seed in seeds]
        down = people.submit(endpoint.types, "down")
        reasons, refusals = zip(*(one.result() for one in running), strict=True)
    assert down.result().returncode == 0, down.result().stdout + down.result().stderr
    answered = [reason for each in reasons for reason in each]
    assert set(answered) == {"length"}
    assert len(answered) > len(seeds)
    assert used() == stored + len(answered)
    assert {
        (r.status_code, r.headers["retry-after"], r.json()["error"]["code"]) for r in refusals if r is not None
    } == {(503, "5", "draining")}
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{endpoint.url}/models", timeout=5)


def _asks_until_refused(endpoint: Endpoint, seed: int) -> tuple[list[str], requests.Response | None]:
    """Why its answers ended, and how the next one was refused; None when there was nobody any more to refuse it."""
    reasons: list[str] = []
    while True:
        try:
            response = endpoint.ask("acme", stream=True, temperature=1.0, seed=seed, max_tokens=LONG)
        except requests.ConnectionError:
            return reasons, None
        if response.status_code != 200:
            return reasons, response
        reasons.append(_reason(response))
