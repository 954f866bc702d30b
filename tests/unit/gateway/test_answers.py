"""Answers as OpenAI's clients read them, and what the engine is asked for. About five seconds, most of it imports."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from orchestrator.modeling.prompts import prompt_ids, render
from serving.engine.protocol import JsonObject, JsonSchema


def events(response: httpx2.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-1] == ""
    assert all(line.startswith("data: ") for line in lines[:-1])
    data = [line.removeprefix("data: ") for line in lines[:-1]]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


# --- chat -----------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_in_full(world):
    response = world.chat()
    body = response.json()
    assert response.status_code == 200
    assert body["choices"] == [
        {
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Hello wörld", "refusal": None},
        }
    ]
    asked = len(world.engine.asked[0].prompt_ids)
    assert body["usage"] == {
        "prompt_tokens": asked,
        "completion_tokens": 3,
        "total_tokens": asked + 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert (body["object"], body["model"]) == ("chat.completion", "acme/intents")
    assert body["id"].startswith("chatcmpl-")


def test_headers_say_what_answered(world):
    headers = world.chat().headers
    assert headers["x-adaptory-adapter"] == world.intents
    assert headers["x-adaptory-base"] == world.base
    assert headers["x-adaptory-replica"] == "replica-1"
    assert headers["x-adaptory-fallback"] == "false"
    assert headers["x-request-id"].startswith("req-")


def test_a_streamed_chat_says_who_speaks_then_the_words_then_why_it_ends(world):
    response = world.chat(stream=True)
    chunks = events(response)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": " wörld"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)
    assert response.headers["x-adaptory-adapter"] == world.intents


def test_usage_comes_last_when_a_stream_is_asked_for_it(world):
    chunks = events(world.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_the_prompt_is_the_bases_chat_template(world):
    world.chat("Ünïcode?")
    text = render(world.tokenizer, [{"role": "user", "content": "Ünïcode?"}])
    assert world.engine.asked[0].prompt_ids == tuple(prompt_ids(world.tokenizer, text))
    assert text.endswith("assistant\n")


def test_content_in_parts_and_the_developers_role(world):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hello"},
    ]
    world.chat(messages=messages)
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert world.engine.asked[0].prompt_ids == tuple(prompt_ids(world.tokenizer, render(world.tokenizer, plain)))


def test_sampling_is_openais_where_nobody_says_otherwise(world):
    world.chat()
    sampling = world.engine.asked[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (1.0, 1.0, None, ())


def test_sampling_as_the_request_says(world):
    world.chat(temperature=0, top_p=0.5, top_k=7, seed=-3, stop="\n", max_tokens=9, max_completion_tokens=5, user="u")
    sampling = world.engine.asked[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 7, -3)
    assert (sampling.stop, sampling.max_tokens) == (("\n",), 5)  # the newer name of the two wins
    assert not sampling.ignore_end
    world.chat(ignore_eos=True)
    assert world.engine.asked[-1].sampling.ignore_end


def test_an_answer_gets_no_more_tokens_than_there_is_room(world):
    world.chat(max_tokens=100_000)
    request = world.engine.asked[0]
    assert len(request.prompt_ids) + request.sampling.max_tokens == 400


SCHEMA = {"type": "object", "properties": {"intent": {"type": "string"}}}


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonObject()),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, JsonSchema(json.dumps(SCHEMA))),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True}}, JsonSchema('{"type": "object"}')),
    ],
)
def test_response_formats(world, format: Any, expected: Any):
    assert world.chat(response_format=format).status_code == 200
    assert world.engine.asked[0].sampling.response_format == expected


# --- what a route adds ----------------------------------------------------------------------------------------------


def test_a_route_gives_its_defaults_where_the_request_is_silent(world):
    world.route(
        "acme/intents",
        adapters=[{"adapter": "acme/intents@production"}],
        defaults={
            "system": "Name the intent.",
            "sampling": {"temperature": 0.25, "max_tokens": 7, "stop": ["."]},
            "json_schema": SCHEMA,
        },
    )
    world.chat("Hi")
    first = world.engine.asked[0]
    messages = [{"role": "system", "content": "Name the intent."}, {"role": "user", "content": "Hi"}]
    assert first.prompt_ids == tuple(prompt_ids(world.tokenizer, render(world.tokenizer, messages)))
    assert (first.sampling.temperature, first.sampling.max_tokens, first.sampling.stop) == (0.25, 7, (".",))
    assert json.loads(first.sampling.response_format.schema) == SCHEMA

    world.chat(
        messages=[{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}],
        temperature=1.5,
        stop=[],
        response_format={"type": "text"},
    )
    second = world.engine.asked[1]
    mine = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    assert second.prompt_ids == tuple(prompt_ids(world.tokenizer, render(world.tokenizer, mine)))
    assert (second.sampling.temperature, second.sampling.max_tokens, second.sampling.stop) == (1.5, 7, ())
    assert second.sampling.response_format is None


def test_a_base_and_one_version_answer_by_their_own_names(world):
    assert world.chat(model="tiny").headers["x-adaptory-adapter"] == "none"
    assert world.chat(model="acme/intents@1").headers["x-adaptory-adapter"] == world.older
    assert [request.adapter for request in world.engine.asked] == [None, world.older]


# --- completions ----------------------------------------------------------------------------------------------------


def complete(world, **fields: Any) -> httpx2.Response:
    return world.ask("/v1/completions", {"model": "acme/intents", "prompt": "Once"} | fields)


def test_a_completion(world):
    body = complete(world).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "stop", "text": "Hello wörld"}]
    request = world.engine.asked[0]
    assert request.prompt_ids == tuple(world.tokenizer("Once")["input_ids"])
    assert request.sampling.max_tokens == 16


def test_a_completion_from_tokens_and_from_a_list_of_one(world):
    complete(world, prompt=[5, 6, 7])
    complete(world, prompt=["Once"])
    complete(world, prompt=[[5, 6, 7]])
    first, second, third = (request.prompt_ids for request in world.engine.asked)
    assert first == third == (5, 6, 7)
    assert second == tuple(world.tokenizer("Once")["input_ids"])


def test_a_streamed_completion(world):
    chunks = events(complete(world, stream=True, stream_options={"include_usage": True}))
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert texts == ["Hel", "lo", " wörld", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1]["usage"]["total_tokens"] == len(world.engine.asked[0].prompt_ids) + 3
