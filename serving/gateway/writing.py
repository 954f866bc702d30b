"""An answer on its way to the client: its whole life is in one call, so that whatever ends it also ends what it holds."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.engine.protocol import TokenEvent
from serving.gateway.answering import Account, Answering
from serving.gateway.errors import body_of, headers_of, status_of
from serving.gateway.requests import ChatRequest, CompletionRequest
from serving.gateway.responses import Form, error_chunk


class AnswerResponse(Response):
    """Asks when it is sent. A client that goes away, before or during the answer, aborts it.

    Args:
        patience: seconds for which a client may read nothing.
    """

    def __init__(self, answering: Answering, body: ChatRequest | CompletionRequest, account: Account, patience: float):
        self._answering, self._body, self._account, self._patience = answering, body, account, patience
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.create_task(self._send(scope, receive, _impatient(send, self._patience)))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        if not answer.cancelled():
            answer.result()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = _Stream(self, send) if self._body.stream else _Whole(self, send)
        try:
            async with self._answering.answer(self._body, self._account) as events:
                async for event in events:
                    await writing.write(event)
        except Exception as error:
            if not writing.started:
                await error_response(error)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": error_chunk(body_of(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def form(self) -> Form:
        account = self._account
        assert account.answering is not None
        digest = account.answering.adapter or account.answering.base_digest
        fingerprint = f"fp_{digest.removeprefix('sha256:')[:12]}"
        kind: Literal["chat", "text"] = "chat" if isinstance(self._body, ChatRequest) else "text"
        return Form(kind, self._body.model, fingerprint, self._body.include_usage)

    def answer_headers(self) -> dict[str, str]:
        """Which adapter and base answered, where, and whether as a fallback."""
        account = self._account
        assert account.answering is not None
        assert account.replica is not None
        return {
            "x-adaptory-adapter": account.answering.adapter or "none",
            "x-adaptory-base": account.answering.base_digest,
            "x-adaptory-replica": account.replica,
            "x-adaptory-fallback": "true" if account.answering.fallback else "false",
        }


class _Whole:
    """One JSON object, when the answer is complete."""

    def __init__(self, response: AnswerResponse, send: Send):
        self._response, self._send = response, send
        self._texts: list[str] = []
        self.started = False

    async def write(self, event: TokenEvent) -> None:
        self._texts.append(event.text)
        if event.finish is None:
            return
        body = json_bytes(self._response.form().whole("".join(self._texts), event))
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        self.started = True
        await _start(self._send, headers | self._response.answer_headers())
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


class _Stream:
    """Server-sent events, as the tokens come."""

    def __init__(self, response: AnswerResponse, send: Send):
        self._response, self._send = response, send
        self.started = False

    async def write(self, event: TokenEvent) -> None:
        parts: list[bytes] = []
        if not self.started:
            form = self._response.form()
            self._chunks, parts = form.chunks(), form.first()
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
            self.started = True
            await _start(self._send, headers | self._response.answer_headers())
        parts += self._chunks(event)
        if parts:
            await self._send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})


def error_response(error: Exception) -> Response:
    return Response(
        json_bytes(body_of(error), plain=True),
        status_of(error),
        headers=headers_of(error),
        media_type="application/json",
    )


def json_bytes(value: Any, *, plain: bool = False) -> bytes:
    """
    Args:
        plain: escape everything but ASCII: an error may repeat text that is no valid UTF-8.
    """
    return json.dumps(value, ensure_ascii=plain, separators=(",", ":")).encode()


def _impatient(send: Send, seconds: float) -> Send:
    """Who reads nothing for so long is as good as gone: it would keep its places among its tenant's requests."""

    async def bounded(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError:
            raise asyncio.CancelledError from None

    return bounded


async def _start(send: Send, headers: dict[str, str]) -> None:
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": encoded})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
