"""What only the operator sees, and what a gateway that is drained does. About five seconds, most of it imports."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import httpx2
import pytest

KEY = "the-operators-own"


def ask(world, key: str | None = KEY) -> httpx2.Response:
    async def send() -> httpx2.Response:
        async with world.client(None) as client:
            return await client.get("/status", headers={"authorization": f"Bearer {key}"} if key else {})

    return asyncio.run(send())


@pytest.fixture
def draining(world) -> list[bool]:
    """Append to it: the gateway is drained."""
    said: list[bool] = []
    world.gateway = dataclasses.replace(world.gateway, ready=lambda: not said)
    return said


def test_status_says_what_runs_and_what_the_replicas_told(world):
    told: dict[str, Any] = {"engine-1": {"r1": {"stats": {"running": 2}}}}
    world.gateway = dataclasses.replace(world.gateway, replicas=lambda: told, deployments={"engine-1": "tiny"})
    response = ask(world)
    assert response.status_code == 200
    assert response.json() == {"in_flight": 0, "ready": True, "models": {"engine-1": "tiny"}, "engines": told}


def test_status_is_of_all_tenants_so_no_tenants_key_opens_it(world):
    for key in (None, "guess", world.keys["acme"]):
        assert ask(world, key).status_code == 401
    world.gateway = dataclasses.replace(world.gateway, metrics_key=None)
    assert ask(world).status_code == 401


def test_a_gateway_that_is_drained_refuses_what_is_new_and_says_when_to_ask_again(world, draining):
    assert world.chat().status_code == 200
    draining.append(True)
    for stream in (False, True):
        response = world.chat(stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert response.headers["retry-after"] == "5"
    assert world.ask("/health", method="GET").status_code == 503
    assert len(world.engine.asked) == 1
    assert sum(row["requests"] for row in world.used()) == 1


def test_what_had_begun_is_answered_and_counted(world, draining):
    world.engine.slowly = 0.05

    async def both() -> list[httpx2.Response]:
        body = {"model": "acme/intents", "messages": [{"role": "user", "content": "What?"}], "stream": True}
        async with world.client() as client:
            begun = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not world.engine.asked:
                await asyncio.sleep(0.005)
            assert world.gateway.metrics.running == 1
            draining.append(True)
            return [await client.post("/v1/chat/completions", json=body), await begun]

    refused, begun = asyncio.run(both())
    assert refused.status_code == 503
    assert begun.status_code == 200
    assert begun.text.endswith("data: [DONE]\n\n")
    assert world.gateway.metrics.running == 0
    assert sum(row["requests"] for row in world.used()) == 1
