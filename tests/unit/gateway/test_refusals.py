"""What is refused, and how: OpenAI's error shape, the right status, and nothing of another tenant. About five seconds."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from orchestrator import errors
from orchestrator.tenants.keys import Scope, create_key, revoke_key
from serving.gateway.requests import LATER


def error(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req-")
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Basic abc", "Bearer sk-guess", "Bearer ak-" + "a" * 12])
def test_no_key_and_no_valid_key(world, header: str | None):
    async def ask() -> httpx2.Response:
        async with world.client(None) as client:
            return await client.get("/v1/models", headers={"authorization": header} if header else {})

    response = asyncio.run(ask())
    assert error(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_revoked_key_is_refused_at_once(world):
    assert world.ask("/v1/models", method="GET").status_code == 200
    revoke_key(world.db, "first", tenant="acme", actor="test")
    assert error(world.ask("/v1/models", method="GET"), 401)["code"] == "invalid_api_key"


def test_a_key_for_something_else_is_forbidden(world):
    world.keys["acme"] = create_key(world.db, "acme", "admin", actor="test", scopes=(Scope.ADMIN,)).secret
    assert error(world.chat(), 403)["code"] == "insufficient_scope"


def test_a_key_is_asked_for_before_the_body_is_read(world):
    assert error(world.ask("/v1/chat/completions", "no object", tenant=None), 401)


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["acme/nothing", "globex/router", "globex/router@1", "nothing", "acme/intents@9"])
def test_unknown_models_and_other_tenants_are_the_same(world, name: str):
    found = error(world.chat(model=name), 404)
    assert (found["code"], found["type"], found["param"]) == ("model_not_found", "invalid_request_error", "model")
    assert found["message"].replace(repr(name), "X") == (
        "The model X does not exist, or you have no access to it. `GET /v1/models` lists those that you may use."
    )
    assert world.engine.asked == []


def test_models_lists_the_tenants_own_and_the_bases(world):
    body = world.ask("/v1/models", method="GET").json()
    assert [(model["id"], model["owned_by"]) for model in body["data"]] == [
        ("acme/intents", "acme"),
        ("tiny", "adaptory"),
    ]
    assert (body["object"], body["has_more"]) == ("list", False)
    assert {model["object"] for model in body["data"]} == {"model"}


@pytest.mark.parametrize("path", ["acme/intents", "acme%2Fintents", "tiny", "acme%2Fintents@1"])
def test_a_model_by_its_name(world, path: str):
    assert world.ask(f"/v1/models/{path}", method="GET").json()["id"] == path.replace("%2F", "/")


def test_a_model_of_nobody(world):
    for path in ("globex%2Frouter", "nothing"):
        assert error(world.ask(f"/v1/models/{path}", method="GET"), 404)["code"] == "model_not_found"


def test_unknown_paths_and_methods(world):
    assert error(world.ask("/v1/engines", method="GET"), 404)["code"] == "unknown_url"
    assert error(world.ask("/v1/models"), 405)["code"] == "method_not_allowed"


# --- fields ---------------------------------------------------------------------------------------------------------

ASKING: dict[str, Any] = {
    "logprobs": True,
    "top_logprobs": 2,
    "n": 2,
    "best_of": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "echo": True,
    "suffix": "x",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "store": True,
    "reasoning_effort": "high",
    "verbosity": "low",
    "moderation": {},
}


def test_every_field_that_comes_later_has_its_case():
    assert set(ASKING) == set(LATER)


@pytest.mark.parametrize("name", LATER)
def test_what_comes_later_is_refused_by_name_and_what_asks_for_nothing_is_not(world, name: str):
    found = error(world.chat(**{name: ASKING[name]}), 400)
    assert (found["code"], found["param"]) == ("unsupported_parameter", name)
    assert name in found["message"]
    for harmless in LATER[name]:
        assert world.chat(**{name: harmless}).status_code == 200


def test_zero_logprobs_are_asked_for_and_false_is_not(world):
    assert error(world.chat(logprobs=0), 400)["param"] == "logprobs"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "invalid_value"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_request"),
        ({"stop": [""]}, "stop", "invalid_request"),
        ({"stop": 5}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"model": 5}, "model", "invalid_value"),
        ({"model": "\ud800"}, "model", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"stream_options": {"nonsense": 1}}, "stream_options.nonsense", "unknown_parameter"),
    ],
)
def test_values_that_cannot_be(world, fields: dict[str, Any], param: str | None, code: str):
    found = error(world.chat(**fields), 400)
    assert found["code"] == code
    assert found["type"] == "invalid_request_error"
    assert param is None or found["param"] == param
    assert world.engine.asked == []


def test_missing_fields(world):
    assert error(world.ask("/v1/chat/completions", {"model": "tiny"}), 400)["param"] == "messages"
    found = error(world.ask("/v1/completions", {"prompt": "x"}), 400)
    assert (found["param"], found["code"]) == ("model", "missing_required_parameter")


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [[1], [2]], [True], {"a": 1}])
def test_prompts_that_cannot_be(world, prompt: Any):
    found = error(world.ask("/v1/completions", {"model": "tiny", "prompt": prompt}), 400)
    assert found["param"].split(".")[0] == "prompt"


def test_a_prompt_that_is_too_long(world):
    for text in ("word " * 500, "x" * 17_000):
        found = error(world.chat(text), 400)
        assert (found["code"], found["param"]) == ("context_length_exceeded", "messages")


def test_half_a_character(world):
    assert error(world.chat("\ud83d"), 400)["param"] == "messages"


def test_a_template_that_refuses(world):
    world.tokenizer.chat_template, kept = "{{ raise_exception('no system message') }}", world.tokenizer.chat_template
    try:
        assert "no system message" in error(world.chat(), 400)["message"]
        world.tokenizer.chat_template = None
        assert "no chat template" in error(world.chat(), 400)["message"]
    finally:
        world.tokenizer.chat_template = kept


# --- bodies ---------------------------------------------------------------------------------------------------------


def send(world, content: Any, **headers: str) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        async with world.client() as client:
            return await client.post("/v1/chat/completions", content=content, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 19_000])
def test_what_is_no_json_object(world, content: bytes):
    assert error(send(world, content), 400)["code"] == "invalid_request"


def test_a_body_that_is_too_large_announced_or_not(world):
    async def parts() -> Any:
        for _ in range(30):
            yield b"x" * 1000

    assert error(send(world, b"x" * 20_001), 413)["code"] == "request_too_large"
    assert error(send(world, parts()), 413)["code"] == "request_too_large"


def test_a_body_that_comes_too_slowly(world):
    taken = []

    async def parts() -> Any:
        for number in range(100):
            taken.append(number)
            yield b" "
            await asyncio.sleep(0.05)

    assert error(send(world, parts()), 408)["code"] == "request_timeout"
    assert len(taken) < 100


def test_behind_a_proxy_the_id_is_the_proxys(world):
    object.__setattr__(world.gateway, "proxied", True)
    given = "from-the-proxy"

    async def ask() -> httpx2.Response:
        async with world.client() as client:
            return await client.post(
                "/v1/chat/completions", content=b'{"model": "tiny"}', headers={"x-request-id": given}
            )

    assert "x-request-id" not in asyncio.run(ask()).headers  # the proxy adds it to what it passes on
    assert world.chat().headers["x-request-id"].startswith("req-")


# --- the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (errors.AdapterError("bad", check="finite"), 424, "invalid_adapter"),
        (errors.SignatureInvalid("not signed", check="signature"), 424, "signature_invalid"),
        (errors.AdapterUnavailable("not now"), 503, "adapter_unavailable"),
        (errors.StoreError("gone"), 503, "store_unavailable"),
        (errors.EngineOverloaded("full"), 429, "engine_overloaded"),
        (errors.ReplicaUnavailable("gone"), 503, "replica_unavailable"),
        (errors.InvalidRequest("schema", field="response_format.schema"), 400, "invalid_request"),
        (errors.StepFailed("failed", cause="CUDA error at 0xdeadbeef"), 500, "engine_step_failed"),
    ],
)
def test_what_the_engine_refuses(world, failure: errors.AdaptoryError, status: int, code: str):
    world.engine.failures[world.intents] = failure
    for stream in (False, True):
        response = world.chat(stream=stream)
        assert error(response, status)["code"] == code
        assert ("retry-after" in response.headers) == (status == 429)
        assert response.headers.get("x-adaptory-check") == failure.context.get("check")
        assert "0xdeadbeef" not in response.text


def test_what_nobody_foresaw_tells_nothing(world, caplog: pytest.LogCaptureFixture):
    def broken(key: str) -> Any:
        raise RuntimeError("password=hunter2")

    object.__setattr__(world.gateway, "authenticate", broken)
    response = world.chat()
    assert error(response, 500)["code"] == "internal_error"
    assert "hunter2" not in response.text
    assert "hunter2" in caplog.text


def test_an_answer_that_breaks_off(world):
    world.engine.broken = errors.ReplicaUnavailable("The replica that answered is gone.")
    response = world.chat(stream=True)
    assert response.status_code == 200
    *chunks, last = response.text.removesuffix("\n\n").split("\n\n")
    assert len(chunks) == 2  # who speaks, and one word
    assert last.startswith('data: {"error":{"message":"The replica that answered is gone."')
    assert error(world.chat(), 503)["code"] == "replica_unavailable"  # a whole answer has not begun
