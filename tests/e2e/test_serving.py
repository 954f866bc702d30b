"""Two tenants' adapters behind a real Ray Serve: `adaptory up`, OpenAI's API over HTTP, `adaptory chat`, `adaptory down`.

One to three minutes on two cores, most of it starts; everything that is asked takes a few seconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from orchestrator.store import Store, adapter_path
from serving.adapter_router import RESIDENCY_SECONDS
from tests.e2e.endpoint import ASKED, TENANTS, Endpoint, prepared, publish, streamed, until

pytestmark = pytest.mark.slow

LONG = 400
"""Tokens of an answer that takes the tiny model about a second."""


@pytest.fixture(scope="module")
def endpoint(tiny_model: Callable[[str], Path]) -> Iterator[Endpoint]:
    with prepared(tiny_model("llama")) as made:
        made.up("--dtype", "float32")
        yield made


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
    for model in ("globex/intents", f"globex/intents@{endpoint.digests['globex']}", "globex/nothing"):
        response = endpoint.ask("acme", model=model)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert requests.get(f"{endpoint.url}/models", timeout=30).status_code == 401


def test_a_changed_route_reaches_the_gateway_within_two_seconds(endpoint: Endpoint):
    endpoint.route("acme", 0, "routed", base_model=endpoint.base_name)
    taken = until(lambda: endpoint.ask("acme", model="acme/routed").status_code == 200)
    assert taken < 2.0


def test_clients_that_go_away_have_their_answers_aborted(endpoint: Endpoint):
    """Eight that are known to be long are left at their first words. The engine counts the tokens of answers that ended:
    had one gone on, it would be among them."""
    seeds = endpoint.long_answers("acme", LONG, 8)
    counted = endpoint.gauge("adaptory_engine_completion_tokens")
    left = endpoint.gauge("adaptory_requests_total", 'status="499"')
    asked = [endpoint.ask("acme", stream=True, temperature=1.0, seed=seed, max_tokens=LONG) for seed in seeds]
    for response in asked:
        response.close()
    until(lambda: endpoint.gauge("adaptory_requests_total", 'status="499"') == left + 8)
    until(lambda: endpoint.gauge("adaptory_engine_running") == 0.0)
    time.sleep(2 * RESIDENCY_SECONDS)
    assert endpoint.gauge("adaptory_engine_completion_tokens") == counted
    assert endpoint.gauge("adaptory_in_flight") == 0.0


def test_an_adapter_that_was_tampered_with_is_refused_and_the_fallback_answers_if_the_route_says_so(endpoint: Endpoint):
    store = Store(str(endpoint.home / "store"))
    files = endpoint.home / "tampered"
    digest = publish(store, files, endpoint.base, seed=77)
    weights = endpoint.home / "store" / adapter_path(digest) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    endpoint.register("acme", "bad", digest)
    only = [{"adapter": f"acme/bad@{digest}"}]
    endpoint.route("acme", 0, "bad", adapters=only)
    until(lambda: endpoint.ask("acme", model="acme/bad").status_code == 424)
    endpoint.route("acme", 1, "bad", adapters=only, fallback=["base"])
    until(lambda: endpoint.ask("acme", model="acme/bad").status_code == 200)
    response = endpoint.ask("acme", model="acme/bad")
    assert response.headers["x-adaptory-adapter"] == "none"
    assert response.headers["x-adaptory-fallback"] == "true"


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


def test_status_and_down(endpoint: Endpoint):
    status = json.loads(endpoint.types("status", "--json").stdout)
    assert status["serving"]["status"] == "RUNNING"
    assert status["cpus"] == os.cpu_count()
    assert "engine-" in endpoint.types("status").stdout
    down = endpoint.types("down")
    assert down.returncode == 0, down.stdout + down.stderr
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{endpoint.url}/models", timeout=5)
