"""What breaks under a real Ray Serve with two engine replicas, while clients ask on: each fault is really made.

Three to four minutes on two cores, most of it starts of processes. In the order of the file: every test leaves the endpoint
as it found it, and says so by asking it again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from sqlalchemy import update

from cluster import connect_if_running, local
from cluster.processes import members
from orchestrator.db import open_database
from orchestrator.db.models import AdapterRow
from orchestrator.limits.quota import Quota
from orchestrator.modeling.base_model import materialize
from orchestrator.settings import Settings
from orchestrator.store import MANIFEST, sha256_file
from orchestrator.tenants.keys import create_key
from orchestrator.tenants.tenant import add_tenant
from orchestrator.tenants.usage import report
from serving.app import USAGE_SECONDS
from tests.e2e.endpoint import ASKED, TENANTS, Endpoint, publish, train, until
from tests.e2e.load import Load

pytestmark = pytest.mark.slow

TOKENS = 200
"""Of an answer: long enough that a fault hits some in the middle."""
CLIENTS = 8
SEQUENCES = 4
"""At the same time in each replica: so few that the clients fill both, and each gets each adapter."""
GONE = {(True, 200, "replica_unavailable"), (True, 503, "replica_unavailable")}
"""How a stream may end whose replica is killed: it had begun, or was just about to."""


@pytest.fixture(scope="module")
def endpoint(tiny_model: Callable[[str], Path]) -> Iterator[Endpoint]:
    home = Path(tempfile.mkdtemp(prefix="as", dir="/tmp"))
    settings = Settings(home=home, ray_address=None, store_url=None)
    base = materialize(str(tiny_model("llama")), cache=settings.cache)
    db = open_database(settings.database)
    made = Endpoint(home, settings, base.path, db, {}, {}, {}, {})
    try:
        for seed, tenant in enumerate(TENANTS, 1):
            add_tenant(db, tenant, Quota(), actor="test")
            made.keys[tenant] = create_key(db, tenant, "test", actor="test").secret
            made.digests[tenant] = made.publish(f"{tenant}/intents", seed).digest
            made.route(f"{tenant}/intents", 0, adapters=[{"adapter": f"{tenant}/intents@1"}])
        done = made.types("up", "--no-serve")
        assert done.returncode == 0, done.stdout + done.stderr
        made.deploy(model(made), max_sequences=SEQUENCES)
        yield made
    finally:
        db.close()
        made.types("down", "--force")
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def answers(endpoint: Endpoint) -> dict[str, dict[int, str]]:
    return {tenant: endpoint.long_answers(tenant, TOKENS, 6) for tenant in TENANTS}


def model(endpoint: Endpoint) -> dict[str, Any]:
    return {"name": endpoint.base_name, "reference": str(endpoint.base), "replicas": {"min": 2, "max": 2}}


# --- what runs ------------------------------------------------------------------------------------------------------


def replicas(endpoint: Endpoint, deployment: str) -> dict[str, int]:
    """Names and process ids of a deployment's replicas that run."""
    client = connect_if_running(endpoint.settings)
    assert client is not None
    found = client.dashboard.get("/api/serve/applications/").json()["applications"]["adaptory"]["deployments"]
    parts = [part for name, part in found.items() if name.startswith(deployment)]
    states = [state for part in parts for state in part["replicas"]]
    return {state["replica_id"]: state["pid"] for state in states if state["state"] == "RUNNING"}


def processes(endpoint: Endpoint, name: str) -> list[psutil.Process]:
    """Of this endpoint's Ray, those whose command has this in it."""
    head = local.find(endpoint.settings)
    assert head is not None
    return [one for one in members(head.id, head.session_dir) if name in " ".join(one.cmdline())]


def replaced(endpoint: Endpoint, deployment: str, before: dict[str, int], gone: str) -> str:
    """Wait until another replica runs in the place of the one that is gone; its name."""

    def now() -> set[str]:
        return set(replicas(endpoint, deployment)) - set(before)

    until(lambda: len(now()) == 1 and gone not in replicas(endpoint, deployment), 90)
    return now().pop()


def used(endpoint: Endpoint) -> tuple[int, int]:
    """Requests and tokens out, as they are charged."""
    rows = report(endpoint.db)
    return sum(row["requests"] for row in rows), sum(row["tokens_out"] for row in rows)


def idle(endpoint: Endpoint) -> None:
    """Nothing is reserved, nothing is in the engines; and each of them says so."""
    telling = [f'replica="{name}"' for name in replicas(endpoint, "engine")]
    until(lambda: [each for each in telling if each not in endpoint.metrics()] == [])
    until(lambda: endpoint.gauge("adaptory_in_flight") == 0.0)
    until(lambda: endpoint.gauge("adaptory_engine_running") + endpoint.gauge("adaptory_engine_waiting") == 0.0)


# --- what is full ---------------------------------------------------------------------------------------------------


def test_nobody_is_turned_away_while_the_other_replica_has_room(endpoint: Endpoint, answers: Any):
    """As many at once as both together take, for one adapter: what the router knows of their queues is a moment old."""
    most = 2 * (SEQUENCES + 1)
    for _ in range(4):
        idle(endpoint)
        together = threading.Barrier(most)

        def ask(seed: int, together: threading.Barrier = together, tenant: str = TENANTS[0]) -> tuple[int, str | None]:
            together.wait()
            answer = endpoint.ask(tenant, temperature=1.0, seed=seed, max_tokens=TOKENS)
            return answer.status_code, answer.headers.get("x-adaptory-replica")

        with ThreadPoolExecutor(most) as people:
            told = list(people.map(ask, range(most)))
        assert Counter(status for status, _ in told) == {200: most}
        assert {replica for _, replica in told} == set(replicas(endpoint, "engine"))


# --- what is killed -------------------------------------------------------------------------------------------------


def test_a_killed_engine_costs_the_streams_on_it_and_nobody_else(endpoint: Endpoint, answers: Any):
    idle(endpoint)
    time.sleep(2 * USAGE_SECONDS)
    charged = used(endpoint)
    before = replicas(endpoint, "engine")
    with Load(endpoint, answers, TOKENS, CLIENTS) as load:
        load.goes_on()
        gone = load.stream_begins_on(before)
        os.kill(before[gone], signal.SIGKILL)
        load.goes_on()
        come = replaced(endpoint, "engine", before, gone)
        until(lambda: {o.tenant for o in list(load.outcomes) if o.replica == come} == set(TENANTS), 60)
    assert load.wrong() == []
    assert load.failed()
    assert {(o.stream, o.status, o.end) for o in load.failed()} <= GONE
    idle(endpoint)
    done = [o for o in load.outcomes if o.end == "done"]
    broken = [o for o in load.failed() if o.status == 200]
    until(lambda: used(endpoint)[0] - charged[0] == len(done) + len(broken))  # once each, however often it was tried
    tokens = used(endpoint)[1] - charged[1]
    assert TOKENS * len(done) <= tokens < TOKENS * (len(done) + len(broken))


def test_an_engine_whose_thread_dies_is_replaced_at_once(endpoint: Endpoint, answers: Any):
    before = replicas(endpoint, "engine")
    gone, pid = next(iter(before.items()))
    with Load(endpoint, answers, TOKENS, CLIENTS) as load:
        load.goes_on()
        kill_thread(endpoint, gone, "engine")
        until(lambda: not psutil.pid_exists(pid), 5)
        load.goes_on()
        replaced(endpoint, "engine", before, gone)
    assert load.wrong() == []
    assert {(o.stream, o.status, o.end) for o in load.failed()} <= GONE | {(True, 200, "engine_stopped")}
    idle(endpoint)


def kill_thread(endpoint: Endpoint, replica: str, name: str) -> None:
    """Threads have no `kill -9`; this is as near as Python comes: the next thing that it does raises SystemExit."""
    head = local.find(endpoint.settings)
    assert head is not None
    code = f"""
import ray
ray.init(address={head.gcs_address!r}, namespace="serve", log_to_driver=False)
(named,) = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].endswith({replica!r})]

def kill(actor):
    import ctypes, threading
    (thread,) = [one for one in threading.enumerate() if one.name == {name!r}]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))

ray.get_actor(named, namespace="serve").__ray_call__.remote(kill)
import time
time.sleep(1)
"""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_path, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | token, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_a_killed_loader_is_replaced_when_an_adapter_is_asked_for(endpoint: Endpoint):
    before = processes(endpoint, "serving.adapters.worker")
    assert len(before) == 2
    digest = endpoint.publish("acme/cold", seed=11).digest
    for loader in before:
        loader.kill()
    response = endpoint.ask("acme", "acme/cold@1")
    assert response.status_code == 200, response.text
    assert response.headers["x-adaptory-adapter"] == digest
    assert 1 <= len(processes(endpoint, "serving.adapters.worker")) <= 2


def test_a_killed_gateway_costs_what_it_was_answering(endpoint: Endpoint, answers: Any):
    before = replicas(endpoint, "gateway")
    ((gone, pid),) = before.items()
    engines = replicas(endpoint, "engine")
    with Load(endpoint, answers, TOKENS, CLIENTS) as load:
        load.goes_on()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        load.goes_on()
        replaced(endpoint, "gateway", before, gone)
    assert load.wrong() == []
    assert load.failed()
    assert {o.end for o in load.failed()} <= {"lost", "plain", "replica_unavailable"}
    assert all(o.status is None or o.status >= 500 for o in load.failed() if not o.stream)
    assert max(Counter(o.client for o in load.failed()).values()) == 1
    assert all(o.began < killed + 1 for o in load.failed())
    assert replicas(endpoint, "engine") == engines
    idle(endpoint)


def test_a_killed_controller_is_missed_by_nobody(endpoint: Endpoint, answers: Any):
    before = replicas(endpoint, "")
    (controller,) = processes(endpoint, "ServeController")
    with Load(endpoint, answers, TOKENS, CLIENTS) as load:
        load.goes_on()
        controller.kill()
        load.goes_on()
        endpoint.route("acme/later", 0, base_model=endpoint.base_name)
        assert until(lambda: endpoint.ask("acme", "acme/later").status_code == 200) < 3.0
        until(lambda: [one.pid for one in processes(endpoint, "ServeController")] not in ([], [controller.pid]), 60)
        until(lambda: replicas(endpoint, "") == before, 60)
        load.goes_on()
    assert load.wrong() == load.failed() == []
    assert json.loads(endpoint.types("status", "--json").stdout)["serving"]["status"] == "RUNNING"


# --- what is gone or no good ----------------------------------------------------------------------------------------


def test_without_the_store_warm_adapters_answer_and_cold_ones_say_so(endpoint: Endpoint, answers: Any):
    here = Path(endpoint.settings.store)
    cold = [endpoint.publish(f"acme/cold-{number}", seed=20 + number).digest for number in range(2)]
    arms = [[{"adapter": f"acme/cold-{number}@1"}] for number in range(2)]
    away = here.rename(here.with_name("away"))
    try:
        with Load(endpoint, answers, TOKENS, CLIENTS) as load:
            endpoint.route("acme/cold", 0, adapters=arms[0])
            endpoint.route("acme/cold-or-base", 0, adapters=arms[1], fallback=["base"])
            until(lambda: endpoint.ask("acme", "acme/cold-or-base").status_code == 200)
            for _ in range(5):
                refused = let_in(lambda: endpoint.ask("acme", "acme/cold"))
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
                instead = let_in(lambda: endpoint.ask("acme", "acme/cold-or-base"))
                assert instead.status_code == 200
                assert instead.headers["x-adaptory-fallback"] == "true"
                assert instead.headers["x-adaptory-adapter"] == "none"
                time.sleep(1)
            load.goes_on()
        assert load.wrong() == load.failed() == []
    finally:
        away.rename(here)
    for name, digest in (("cold", cold[0]), ("cold-or-base", cold[1])):
        until(
            lambda name=name, digest=digest: (
                endpoint.ask("acme", f"acme/{name}").headers.get("x-adaptory-adapter") == digest
            )
        )


def let_in(ask: Callable[[], requests.Response]) -> requests.Response:
    """Beside clients that fill every place: ask again when there is none, as OpenAI's client does."""
    answer = ask()
    while answer.status_code == 429:
        time.sleep(0.2)
        answer = ask()
    return answer


def pickled(shelf: Path) -> None:
    (shelf / "adapter_model.safetensors").rename(shelf / "adapter_model.bin")
    restated(shelf)


def traversing(shelf: Path) -> None:
    (shelf.parent / "outside.json").write_text("{}")
    restated(shelf, "../outside.json")


def linked(shelf: Path) -> None:
    outside = shutil.move(shelf / "adapter_config.json", shelf.parent / "config.json")
    (shelf / "adapter_config.json").symlink_to(outside)


def unfinished(shelf: Path) -> None:
    (shelf / MANIFEST).unlink()


def sound(shelf: Path) -> None:
    manifest = json.loads((shelf / MANIFEST).read_text())
    manifest["metadata"] = {}  # which says nothing, so that the files themselves are looked at
    (shelf / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("check", "base", "rank", "spoil"),
    [
        ("weights", "llama", 4, pickled),
        ("contained", "llama", 4, traversing),
        ("contained", "llama", 4, linked),
        ("published", "llama", 4, unfinished),
        ("base", "qwen3", 4, sound),
    ],
)
def test_an_adapter_that_is_no_good_is_refused_by_name(
    endpoint: Endpoint,
    tiny_model: Callable[[str], Path],
    check: str,
    base: str,
    rank: int,
    spoil: Callable[[Path], None],
):
    """Each is signed by whom the engine trusts. (`test_serving` has those that are damaged, tampered with or unsigned.)"""
    name = f"{check}-{spoil.__name__}"
    files = train(endpoint.home / name, tiny_model(base), zlib.crc32(name.encode()), rank)
    version = publish(endpoint.settings, endpoint.db, files, f"acme/{name}")
    spoil(endpoint.shelf(version.digest))
    with endpoint.db.write() as session:  # the database takes it for one of this base
        ours = materialize(str(endpoint.base), cache=endpoint.settings.cache).digest
        session.execute(update(AdapterRow).where(AdapterRow.digest == version.digest).values(base_digest=ours))
    for stream in (False, True):
        response = endpoint.ask("acme", version.reference, stream=stream)
        assert (response.status_code, response.headers.get("x-adaptory-check")) == (424, check), response.text
        assert response.json()["error"]["code"] == "invalid_adapter"
        assert str(endpoint.home) not in response.text
    assert endpoint.ask("acme").status_code == 200


@pytest.mark.parametrize("name", ["acme/../globex/intents", "acme/intents@../../etc", "acme/intents@sha256:../../x"])
def test_a_name_that_would_leave_its_directory_is_nobodys(endpoint: Endpoint, name: str):
    response = endpoint.ask("acme", name)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def restated(stored: Path, *more: str) -> None:
    """Make the manifest fit the files again, as somebody would who wants a change to go unseen."""
    file = stored / MANIFEST
    manifest = json.loads(file.read_text())
    names = [path.name for path in stored.iterdir() if path.name != MANIFEST] + list(more)
    manifest["files"] = {
        name: {"size": (stored / name).stat().st_size, "sha256": sha256_file(stored / name)} for name in names
    }
    file.write_text(json.dumps(manifest))


# --- what is slow ---------------------------------------------------------------------------------------------------


def test_clients_that_read_nothing_stall_nobody_and_cost_little(endpoint: Endpoint, answers: Any):
    """Their answers are made to the end and wait for them; what holds them is freed when they have read or left."""
    serving = [psutil.Process(pid) for pid in replicas(endpoint, "gateway").values()] + processes(
        endpoint, "ProxyActor"
    )
    with Load(endpoint, answers, TOKENS, CLIENTS) as load:
        load.goes_on()
        memory = sum(one.memory_info().rss for one in serving)
        stalled = [stalls(endpoint, seed) for seed in list(answers["acme"]) * 2]
        load.goes_on(2 * CLIENTS)
        grown = sum(one.memory_info().rss for one in serving) - memory
    assert load.wrong() == load.failed() == []
    idle(endpoint)  # though they have read nothing yet
    assert grown < 64 << 20
    for connection in stalled:
        assert everything(connection).rstrip().endswith(b"data: [DONE]\n\n\r\n0")


def stalls(endpoint: Endpoint, seed: int) -> socket.socket:
    """Asks for an answer and reads none of it, with as little room for it as the system allows."""
    fields = {"model": "acme/intents", "stream": True, "seed": seed, "temperature": 1.0, "max_tokens": TOKENS}
    body = json.dumps(fields | {"messages": [{"role": "user", "content": ASKED}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {endpoint.keys['acme']}\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", endpoint.port))
    connection.settimeout(30)
    connection.sendall(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    if connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 429":  # the clients beside it have filled the engines
        connection.close()
        time.sleep(0.2)
        return stalls(endpoint, seed)
    return connection


def everything(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


# --- what is changed ------------------------------------------------------------------------------------------------


def test_a_deploy_in_the_middle_of_traffic_fails_no_request_and_leaves_what_is_the_same(
    endpoint: Endpoint, answers: Any, tiny_model: Callable[[str], Path]
):
    before, second = replicas(endpoint, "engine"), tiny_model("qwen3")
    with Load(endpoint, answers, TOKENS, CLIENTS) as load:
        load.goes_on()
        other = {"name": "second", "reference": str(second)}
        endpoint.deploy(model(endpoint), other, max_sequences=SEQUENCES)
        assert before.items() <= replicas(endpoint, "engine").items()
        assert endpoint.ask("acme", "second").status_code == 200
        load.goes_on()
        endpoint.deploy(model(endpoint), max_sequences=SEQUENCES + 1)
        assert not set(before) & set(replicas(endpoint, "engine"))
        assert endpoint.ask("acme", "second").status_code == 404
        load.goes_on()
    assert load.wrong() == load.failed() == []
