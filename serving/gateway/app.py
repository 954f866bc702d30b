"""The FastAPI application: validates, delegates, and gives every answer its request id and every error OpenAI's form."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.errors import AdaptoryError, ApiKeyRefused
from orchestrator.tenants.keys import Principal
from orchestrator.tenants.keys import Scope as KeyScope
from serving.gateway.answering import Account, Answering
from serving.gateway.body import ClientDisconnect, read_json
from serving.gateway.errors import body_of, plain_body
from serving.gateway.gateway import Gateway
from serving.gateway.requests import ChatRequest, CompletionRequest, parse
from serving.gateway.writing import AnswerResponse, error_response, json_bytes

log = logging.getLogger("serving.requests")


def create_app(gateway: Gateway) -> FastAPI:
    """OpenAI's API over what `gateway` holds."""
    app = FastAPI(title="Adaptory", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    answering = Answering(gateway)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await ask(request, ChatRequest)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await ask(request, CompletionRequest)

    async def ask(request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        account = Account(request.state.request_id, await _principal(request, gateway))
        body = parse(kind, await read_json(request, gateway.bounds))
        return AnswerResponse(answering, body, account)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        tenant, routes = (await _principal(request, gateway)).tenant.name, gateway.routes()
        listed = [_model(name, tenant, gateway) for name in routes.models(tenant)]
        return _json({"object": "list", "data": listed, "has_more": False})

    @app.get("/v1/models/{id:path}")
    async def model(request: Request, id: str) -> Response:
        tenant, routes = (await _principal(request, gateway)).tenant.name, gateway.routes()
        if id not in routes.models(tenant):  # one version of an adapter is asked by its name and stands in no list
            await asyncio.to_thread(routes.resolve, tenant, id)
        return _json(_model(id, tenant, gateway))

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _require_operator(request, gateway)
        return Response(gateway.metrics.text(gateway.replicas()), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status(request: Request) -> Response:
        """For `adaptory status`: what this gateway does, and what the engines' replicas told it last."""
        _require_operator(request, gateway)
        told = {"in_flight": gateway.metrics.running, "ready": gateway.ready(), "models": gateway.deployments}
        return _json(told | {"engines": gateway.replicas()})

    @app.get("/health")
    async def health() -> Response:
        ready = gateway.ready()
        return _json({"status": "ok" if ready else "draining"}, 200 if ready else 503)

    def refused(request: Request, error: Exception) -> Response:
        """What fails before anybody is asked: no key, no JSON, a field that cannot be."""
        response, code = error_response(error), body_of(error)["error"]["code"]
        gateway.metrics.refused.labels(str(response.status_code), code).inc()
        facts = {"request": request.state.request_id, "status": response.status_code, "error": code}
        log.info(json.dumps(facts))
        return response

    app.add_exception_handler(AdaptoryError, refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(RequestIds, proxied=gateway.proxied)
    return app


async def _principal(request: Request, gateway: Gateway) -> Principal:
    """
    Raises:
        ApiKeyRefused, ScopeMissing
    """
    principal = await asyncio.to_thread(gateway.authenticate, _bearer(request))
    principal.require(KeyScope.INFERENCE)
    return principal


def _require_operator(request: Request, gateway: Gateway) -> None:
    """
    Raises:
        ApiKeyRefused
    """
    key = gateway.metrics_key
    if key is None or not hmac.compare_digest(_bearer(request).encode(), key.encode()):
        raise ApiKeyRefused("The metrics of all tenants have a key of their own.", hint="It is in keys/metrics_key.")


def _bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise ApiKeyRefused(
            "No API key was sent.", hint="Send it as `Authorization: Bearer ak-…`; `adaptory keys create` makes one."
        )
    return key.strip()


def _model(name: str, tenant: str, gateway: Gateway) -> dict[str, Any]:
    owner = tenant if name.startswith(f"{tenant}/") else "adaptory"
    return {"id": name, "object": "model", "created": int(gateway.started_at), "owned_by": owner}


def _json(value: Any, status: int = 200) -> Response:
    return Response(json_bytes(value), status, media_type="application/json")


def _http_error(_: Request, error: Exception) -> Response:
    """An unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    body = json_bytes(plain_body(error.status_code, str(error.detail)), plain=True)
    return Response(body, error.status_code, headers=error.headers, media_type="application/json")


class RequestIds:
    """Outermost: gives each request an id, and answers what nobody foresaw with 500 and no detail.

    Args:
        proxied: Serve's proxy has put an id (its own, or the client's) into the request's headers, and will put it into the
            answer's.
    """

    def __init__(self, app: ASGIApp, proxied: bool):
        self._app, self._proxied = app, proxied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "") if self._proxied else ""
        request_id, started = given[:_LONGEST_ID] or f"req-{secrets.token_hex(12)}", False
        scope.setdefault("state", {})["request_id"] = request_id

        async def with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not given:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except ClientDisconnect:
            log.info("%s: the client went away while it sent its request", request_id)
        except Exception as error:
            log.exception("%s failed", request_id)
            if started:
                raise
            await error_response(error)(scope, receive, with_id)


_LONGEST_ID = 128
