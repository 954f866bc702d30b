"""What the gateway answers to, as OpenAPI 3.1: the same models that read the requests say what they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from orchestrator import __version__
from serving.gateway.errors import STATUSES
from serving.gateway.requests import LATER, ChatRequest, CompletionRequest

Schema = dict[str, Any]

_REF = "#/components/schemas/"
_ANSWERED = {"chat": "chat.completion", "text": "text_completion"}
_HEADERS = ("x-adaptory-adapter", "x-adaptory-base", "x-adaptory-replica", "x-adaptory-fallback")


def document() -> Schema:
    _, found = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template=_REF + "{model}"
    )
    schemas = found["$defs"]
    for kind in (ChatRequest, CompletionRequest):
        schemas[kind.__name__]["properties"] |= {name: _one_of(harmless) for name, harmless in LATER.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Adaptory", "version": __version__},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas | _answers(),
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _asking(ChatRequest, "chat", "Answer a conversation.")},
            "/v1/completions": {"post": _asking(CompletionRequest, "text", "Go on with a text.")},
            "/v1/models": {"get": _reading("Models", "The models that this key may use.", (401, 403, 503))},
            "/v1/models/{model}": {
                "get": _reading("Model", "One of them.", (401, 403, 404, 503))
                | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
            },
            "/health": {
                "get": {
                    "summary": "Whether requests should come here.",
                    "security": [],
                    "responses": {status: _json("Health", "") for status in ("200", "503")},
                }
            },
        },
    }


def _asking(kind: type[BaseModel], answer: str, summary: str) -> Schema:
    whole = _json(f"{answer}_answer", "The answer; with `stream`, its chunks as server-sent events.")
    whole["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    whole["headers"] = {name: {"schema": {"type": "string"}} for name in _HEADERS}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": _REF + kind.__name__}}}},
        "responses": {"200": whole, "500": _json("Error", "It failed.")} | _errors(STATUSES),
    }


def _reading(schema: str, summary: str, errors: Iterable[int]) -> Schema:
    return {"summary": summary, "responses": {"200": _json(schema, ""), **_errors(errors)}}


def _errors(statuses: Iterable[int]) -> dict[str, Schema]:
    return {str(status): _json("Error", "It is refused; the message says why.") for status in sorted(set(statuses))}


def _json(schema: str, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": _REF + schema}}}}


def _answers() -> dict[str, Schema]:
    text, number, nothing = {"type": "string"}, {"type": "integer"}, {"type": "null"}
    model = _object(id=text, object={"const": "model"}, created=number, owned_by=text)
    usage = _object(
        prompt_tokens=number,
        completion_tokens=number,
        total_tokens=number,
        prompt_tokens_details=_object(cached_tokens=number),
    )
    made = {}
    for kind, name in _ANSWERED.items():
        said = {"text": text}
        if kind == "chat":
            said = {"message": _object(role={"const": "assistant"}, content=text, refusal=nothing)}
        choice = _object(index=number, logprobs=nothing, finish_reason={"enum": ["stop", "length"]}, **said)
        made[f"{kind}_answer"] = _object(
            id=text,
            object={"const": name},
            created=number,
            model=text,
            system_fingerprint={"type": ["string", "null"]},
            choices={"type": "array", "items": choice, "minItems": 1, "maxItems": 1},
            usage=usage,
        )
    optional = {"type": ["string", "null"]}
    return made | {
        "Model": model,
        "Models": _object(object={"const": "list"}, data={"type": "array", "items": model}, has_more={"const": False}),
        "Health": _object(status={"enum": ["ok", "draining"]}),
        "Error": _object(error=_object(message=text, type=text, param=optional, code=optional)),
    }


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _one_of(values: Iterable[Any]) -> Schema:
    return {"enum": list(values), "description": "Nothing else is answered yet."}
