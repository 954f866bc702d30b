"""The unmodified `openai` client against the gateway. About five seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from orchestrator.errors import ReplicaUnavailable

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: pip install openai==3.51.0")

T = TypeVar("T")


def use(world, what: Callable[[Any], Awaitable[T]], tenant: str = "acme", strict: bool = True) -> T:
    async def run() -> T:
        async with world.client(None) as http:
            client = openai.AsyncOpenAI(
                api_key=world.keys[tenant],
                base_url="http://gateway/v1",
                http_client=http,
                max_retries=0,
                _strict_response_validation=strict,
            )
            return await what(client)

    return asyncio.run(run())


ASK: dict[str, Any] = {"model": "acme/intents", "messages": [{"role": "user", "content": "Hello"}]}


def test_chat(world):
    answer = use(world, lambda client: client.chat.completions.create(**ASK, max_completion_tokens=9, temperature=0))
    assert answer.choices[0].message.content == "Hello wörld"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 3
    assert answer._request_id.startswith("req-")


def test_streamed_chat(world):
    async def ask(client: Any) -> list[Any]:
        stream = await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
        return [chunk async for chunk in stream]

    chunks = use(world, ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello wörld"
    assert chunks[-1].usage.completion_tokens == 3


def test_completions(world):
    whole = use(world, lambda client: client.completions.create(model="tiny", prompt="Once"))
    assert whole.choices[0].text == "Hello wörld"

    async def ask(client: Any) -> str:
        stream = await client.completions.create(model="tiny", prompt="Once", stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    # not strict: its type for chunks of this endpoint knows no null finish_reason, which OpenAI sends as well
    assert use(world, ask, strict=False) == "Hello wörld"


def test_parsed_answers(world):
    pydantic = pytest.importorskip("pydantic")

    class Intent(pydantic.BaseModel):
        intent: str

    world.engine.words = ('{"intent":', ' "greet"}')
    answer = use(world, lambda client: client.chat.completions.parse(**ASK, response_format=Intent))
    assert answer.choices[0].message.parsed == Intent(intent="greet")
    assert '"intent"' in world.engine.asked[0].sampling.response_format.schema


def test_models(world):
    async def ask(client: Any) -> tuple[list[str], str]:
        listed = [model.id async for model in client.models.list()]
        return listed, (await client.models.retrieve("acme/intents")).id

    assert use(world, ask) == (["acme/intents", "tiny"], "acme/intents")


def test_errors_are_the_ones_that_the_client_knows(world):
    def failing(kind: type[Exception], tenant: str = "acme", **fields: Any) -> Any:
        with pytest.raises(kind) as caught:
            use(world, lambda client: client.chat.completions.create(**ASK | fields), tenant)
        return caught.value

    assert failing(openai.NotFoundError, model="globex/router").code == "model_not_found"
    assert failing(openai.BadRequestError, n=2).param == "n"
    world.limit(requests_per_minute=0)
    assert failing(openai.RateLimitError).code == "rate_limit_exceeded"
    world.keys["acme"] = "ak-nobody"
    assert failing(openai.AuthenticationError).code == "invalid_api_key"


def test_a_stream_that_breaks_off_raises(world):
    world.engine.broken = ReplicaUnavailable("The replica that answered is gone.")

    async def ask(client: Any) -> None:
        async for _ in await client.chat.completions.create(**ASK, stream=True):
            pass

    with pytest.raises(openai.APIError, match="The replica that answered is gone"):
        use(world, ask)
