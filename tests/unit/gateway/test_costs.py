"""What a request may cost and did cost: limits, usage, fallbacks, clients that go away, metrics, the log. About ten seconds."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from typing import Any

import httpx2
import pytest

from orchestrator.errors import AdapterError, AdapterUnavailable, EngineOverloaded, StepFailed
from serving.engine.protocol import EngineStats

IDLE = EngineStats(0, 0, (), 0, 0, 0, 0, 0, 0, 0, 0, 0.0)
CHAT = {"model": "acme/intents", "messages": [{"role": "user", "content": "What is it?"}]}


def prompt_tokens(world) -> int:
    return len(world.engine.asked[0].prompt_ids)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_requests_per_minute(world):
    world.limit(requests_per_minute=2)
    assert [world.chat().status_code for _ in range(3)] == [200, 200, 429]
    refused = world.chat()
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert 0 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert world.chat(tenant="globex", model="globex/router").status_code == 200


def test_tokens_are_reserved_at_most_and_settled_as_used(world):
    world.limit(tokens_per_minute=150)
    assert world.chat(max_tokens=100).status_code == 200
    used = prompt_tokens(world) + 3
    assert world.chat(max_tokens=150 - used - prompt_tokens(world)).status_code == 200  # all that is left, and no more
    assert world.chat(max_tokens=120).status_code == 429


def test_more_tokens_than_are_ever_allowed_is_not_to_be_tried_again(world):
    world.limit(tokens_per_minute=50)
    refused = world.chat(max_tokens=100)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers


def test_concurrent_requests(world):
    world.limit(concurrent_requests=2)
    world.engine.slowly = 0.2

    async def three() -> list[int]:
        async with world.client() as client:
            asked = [client.post("/v1/chat/completions", json=CHAT) for _ in range(3)]
            return sorted(response.status_code for response in await asyncio.gather(*asked))

    assert asyncio.run(three()) == [200, 200, 429]
    assert world.limiter.in_flight("acme") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_it_begins_costs_nothing(world, stream: bool):
    world.limit(requests_per_minute=1)
    world.engine.failures[world.intents] = EngineOverloaded("full")
    assert world.chat(stream=stream).status_code == 429
    world.engine.failures.clear()
    assert world.chat(stream=stream).status_code == 200
    assert sum(row["requests"] for row in world.used()) == 1


def test_a_flood_asks_a_full_engine_once_in_a_moment(world):
    world.gateway.full.ended(world.base, 8.0)  # as a slow engine's answers
    world.engine.failures |= {world.intents: EngineOverloaded("full"), None: EngineOverloaded("full")}

    async def flood() -> list[httpx2.Response]:
        async with world.client() as client, world.client("globex") as other:
            first = await client.post("/v1/chat/completions", json=CHAT)
            again = [await client.post("/v1/chat/completions", json=CHAT) for _ in range(5)]
            await client.post("/v1/chat/completions", json=CHAT | {"model": "tiny"})  # another adapter: none
            await other.post("/v1/chat/completions", json=CHAT | {"model": "tiny"})  # another tenant
            return [first, *again]

    answers = asyncio.run(flood())
    assert [answer.status_code for answer in answers] == [429] * 6
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert [(request.tenant, request.adapter) for request in world.engine.asked] == [
        ("acme", world.intents),
        ("acme", None),
        ("globex", None),
    ]


def test_usage_is_counted_by_route_and_adapter(world):
    world.chat()
    world.chat(stream=True)
    world.chat(model="tiny")
    rows = {(row["route"], row["adapter"]): row for row in world.used()}
    assert rows["acme/intents", world.intents] | {"tenant": "acme"} == {
        "tenant": "acme",
        "route": "acme/intents",
        "adapter": world.intents,
        "requests": 2,
        "tokens_in": 2 * prompt_tokens(world),
        "tokens_out": 6,
    }
    assert rows["tiny", ""]["requests"] == 1


# --- fallbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [AdapterError("bad", check="digest"), AdapterUnavailable("not now")])
def test_a_fallback_answers_only_where_the_route_says_so(world, failure: Any):
    world.engine.failures[world.intents] = failure
    assert world.chat().status_code in (424, 503)
    world.route("acme/intents", adapters=[{"adapter": "acme/intents@production"}], fallback=["acme/intents@1", "base"])
    response = world.chat()
    assert response.headers["x-adaptory-adapter"] == world.older
    assert response.headers["x-adaptory-fallback"] == "true"
    world.engine.failures[world.older] = failure
    response = world.chat(stream=True)
    assert response.headers["x-adaptory-adapter"] == "none"
    assert response.headers["x-adaptory-fallback"] == "true"
    world.engine.failures[None] = failure
    response = world.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")


def test_a_full_engine_is_no_reason_to_fall_back(world):
    world.route("acme/intents", adapters=[{"adapter": "acme/intents@production"}], fallback=["base"])
    world.engine.failures[world.intents] = EngineOverloaded("full")
    assert world.chat().status_code == 429


# --- clients that go away -------------------------------------------------------------------------------------------


async def leave(world, after: float, **fields: Any) -> list[dict[str, Any]]:
    """Ask, and go away after so many seconds; what was sent until then."""
    body = json.dumps(CHAT | fields).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {world.keys['acme']}".encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "root_path": "",
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(after)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await asyncio.wait_for(world.app(scope, receive, send), timeout=20)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts_its_request(world, stream: bool):
    world.engine.slowly = 1.0 if stream else 5.0
    sent = asyncio.run(leave(world, 0.3, stream=stream))
    assert bool(sent) == stream  # of a whole answer nothing had been sent
    assert world.engine.closed == [world.engine.asked[0].id]
    assert world.engine.finished == []
    assert world.limiter.in_flight("acme") == 0
    (row,) = world.used()
    assert (row["tokens_in"], row["tokens_out"]) == (prompt_tokens(world), 1 if stream else 0)
    assert 'status="499"' in metrics(world)


def test_a_client_that_goes_away_while_its_place_is_reserved_leaves_none_taken(world):
    """Of the moment between the two nothing can be seen from outside, so the limiter makes it long, as a database would."""
    reserve, world.limiter.waits = world.limiter.reserve, True

    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return reserve(*arguments)

    world.limiter.reserve = slow
    asyncio.run(leave(world, 0.1))
    assert world.engine.asked == []
    assert world.limiter.in_flight("acme") == 0


# --- metrics and the log --------------------------------------------------------------------------------------------


def metrics(world, key: str = "the-operators-own") -> str:
    world.keys["operator"] = key
    response = world.ask("/metrics", tenant="operator", method="GET")
    return response.text if response.status_code == 200 else str(response.status_code)


def value(text: str, name: str, **labels: str) -> float:
    """Of the one sample with these labels."""
    wanted = {f'{label}="{content}"' for label, content in labels.items()}
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    (line,) = [line for line in lines if all(label in line for label in wanted)]
    return float(line.rsplit(" ", 1)[1])


def test_metrics_by_route_and_adapter(world):
    world.route("acme/intents", adapters=[{"adapter": "acme/intents@production"}], fallback=["base"])
    world.chat(stream=True)
    world.engine.failures[world.intents] = AdapterUnavailable("not now")
    world.chat()
    world.chat(model="acme/unknown")
    world.engine.failures.clear()
    world.engine.broken = StepFailed("failed")
    world.chat(stream=True)
    text = metrics(world)
    by = {"route": "acme/intents", "adapter": world.intents[7:19]}
    base = {"route": "acme/intents", "adapter": ""}
    assert value(text, "adaptory_requests_total", **by, status="200") == 1
    assert value(text, "adaptory_requests_total", **by, status="500") == 1
    assert value(text, "adaptory_errors_total", **by, code="engine_step_failed") == 1
    assert value(text, "adaptory_errors_total", route="", adapter="", code="model_not_found") == 1
    assert value(text, "adaptory_fallbacks_total", **base) == 1
    assert value(text, "adaptory_completion_tokens_total", **by) == 4
    assert value(text, "adaptory_first_token_seconds_count", **by) == 2
    assert value(text, "adaptory_between_tokens_seconds_count", **by) == 2
    assert value(text, "adaptory_in_flight") == 0
    assert "unknown" not in text


def test_what_leads_nowhere_is_counted_too(world):
    world.chat(n=2)
    world.ask("/v1/models", tenant=None, method="GET")
    text = metrics(world)
    assert value(text, "adaptory_refused_total", status="400", code="unsupported_parameter") == 1
    assert value(text, "adaptory_refused_total", status="401", code="invalid_api_key") == 1


def test_metrics_have_a_key_of_their_own(world):
    assert metrics(world, world.keys["acme"]) == "401"
    assert metrics(world, "") == "401"


def test_metrics_of_the_engines_replicas(world):
    from serving.gateway.metrics import _ENGINE

    cache = {key: 0 for part, key, _ in _ENGINE.values() if part == "cache"} | {"cold": 7}
    told = {"stats": dataclasses.asdict(IDLE) | {"running": 3}, "cache": cache}
    object.__setattr__(world.gateway, "replicas", lambda: {"engine-0": {"r1": told, "r2": {}}})
    text = metrics(world)
    assert value(text, "adaptory_engine_running", deployment="engine-0", replica="r1") == 3
    assert value(text, "adaptory_engine_cold_loads", deployment="engine-0", replica="r1") == 7
    assert "r2" not in text  # it has not told anything yet


def test_labels_have_an_end(world):
    from serving.gateway.metrics import _MOST_LABELS, OTHER

    counted = {world.gateway.metrics.labels(f"acme/r{n}", None) for n in range(_MOST_LABELS + 50)}
    assert len(counted) == _MOST_LABELS + 1
    assert (OTHER, OTHER) in counted


def test_one_line_of_log_for_each_request_and_not_a_word_of_it(world, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    response = world.chat("my-secret-question", user="person-7")
    world.chat("my-secret-question", model="acme/nothing")
    first, second = (json.loads(r.message) for r in caplog.records if r.name == "serving.requests")
    assert first["request"] == response.headers["x-request-id"]
    assert (first["tenant"], first["model"], first["adapter"]) == ("acme", "acme/intents", world.intents)
    assert (first["status"], first["tokens_out"], first["replica"]) == (200, 3, "replica-1")
    assert (second["status"], second["error"]) == (404, "model_not_found")
    assert "secret" not in caplog.text
    assert "Hello" not in caplog.text
    assert world.keys["acme"] not in caplog.text


def test_health_needs_no_key(world):
    assert world.ask("/health", tenant=None, method="GET").json() == {"status": "ok"}
    object.__setattr__(world.gateway, "ready", lambda: False)
    assert world.ask("/health", tenant=None, method="GET").status_code == 503
