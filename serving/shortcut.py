"""The short way from Serve's proxy to a gateway on the same machine, for requests that stream many small pieces.

Serve's own way from its proxy to a replica costs 5 ms before the body is there (it is fetched by a call back) and half a
millisecond of CPU for every piece of the answer (measured, `tests/bench/http_overhead.py`). So each gateway also listens on a
Unix socket, and a middleware in the proxy sends answers' requests there. Whatever does not work that way (no gateway on
this machine, one that has just gone) goes Serve's way, which waits for a replica.

One connection is one request: frames of a kind, a length and bytes. Who goes away closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.errors import ReplicaUnavailable
from serving.gateway.errors import body_of, status_of
from serving.gateway.responses import error_chunk
from serving.meeting import frame, meeting_place, read_frame

log = logging.getLogger(__name__)

PATHS = ("/v1/chat/completions", "/v1/completions")
"""What goes the short way: other applications of the cluster may own other paths."""

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.shortcut:middlewares"}
"""The environment in which Serve's proxy takes the middleware."""

_SUFFIX = ".http"
_HEAD, _BODY, _END = b"h", b"b", b"e"
_BODY_SECONDS = 0.1
"""For the body's beginning to travel with the head; whose body takes longer is the gateway's to judge."""
_LATE_SECONDS = 0.2
"""For requests that were on their way when a gateway began to close."""


# --- the gateway's end ----------------------------------------------------------------------------------------------


async def open_door(app: ASGIApp) -> Door | None:
    """None where it cannot be: requests then come Serve's way."""
    try:
        door = Door(app, meeting_place())
        await door.open()
    except OSError as error:
        log.warning("there is no short way to this gateway: %s", error)
        return None
    return door


class Door:
    """Has an ASGI application answer what comes through a socket."""

    def __init__(self, app: ASGIApp, directory: Path):
        self._app, self._path = app, directory / f"{os.getpid()}{_SUFFIX}"
        self._answering: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        self._path.unlink(missing_ok=True)  # of a process that had this number before
        self._server = await asyncio.start_unix_server(self._enter, self._path, backlog=1024)

    async def close(self) -> None:
        """Take no new requests; returns when those that had begun are answered."""
        self._path.unlink(missing_ok=True)
        await asyncio.sleep(_LATE_SECONDS)
        self._server.close()
        while self._answering:
            await asyncio.wait(self._answering)

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        except Exception:
            log.exception("an answer broke off")  # and the proxy sees that its end is missing
        finally:
            self._answering.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, head = await read_frame(reader)
        complete, start = False, b""

        async def receive() -> Message:
            nonlocal complete
            if not complete:
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    kind, data = await read_frame(reader)
                    complete = kind == _END
                    return {"type": "http.request", "body": data, "more_body": not complete}
            else:
                with contextlib.suppress(ConnectionError):
                    await reader.read(1)
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                facts = {"status": message["status"], "headers": _texts(message.get("headers", ()))}
                start = frame(_HEAD, json.dumps(facts).encode())
                return
            writer.write(start + _frames(message))
            start = b""
            await writer.drain()

        await self._app(_scope(json.loads(head)), receive, send)


# --- the proxy's end ------------------------------------------------------------------------------------------------


def middlewares() -> list[Middleware]:
    """Serve's proxy calls it (`CALLBACK`) when it starts."""
    try:
        return [Middleware(Shortcut, directory=meeting_place())]
    except OSError as error:
        log.warning("there is no short way to gateways: %s", error)
        return []


class Shortcut:
    """Sends requests for answers to the gateway on this machine that is answering the fewest of them; all else goes on."""

    def __init__(self, app: ASGIApp, directory: Path):
        self._app, self._directory = app, directory
        self._answering: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        for name in sorted(self._doors(), key=lambda name: self._answering[name]):
            path = self._directory / name
            try:
                reader, writer = await asyncio.open_unix_connection(path)
            except ConnectionRefusedError:  # it was killed
                path.unlink(missing_ok=True)
                continue
            except OSError:
                continue
            self._answering[name] += 1
            try:
                await _Forwarding(scope, send, reader, writer).run(receive)
            finally:
                self._answering[name] -= 1
                writer.close()
            return
        await self._app(scope, receive, send)

    def _doors(self) -> list[str]:
        try:
            return [path.name for path in self._directory.iterdir() if path.suffix == _SUFFIX]
        except OSError:  # somebody has cleaned up
            return []


class _Forwarding:
    """One request on its way to a gateway, and its answer on the way back."""

    def __init__(self, scope: Scope, send: Send, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._scope, self._send, self._reader, self._writer = scope, send, reader, writer
        self._started = self._streaming = self._gone = False
        self._head = frame(_HEAD, json.dumps(_facts(scope)).encode())

    async def run(self, receive: Receive) -> None:
        asking = asyncio.create_task(self._ask(receive))
        slow = asyncio.get_running_loop().call_later(_BODY_SECONDS, self._write)
        try:
            await self._answer()
        except (ConnectionError, asyncio.IncompleteReadError):
            if not self._gone:
                await self._broken()
        finally:
            slow.cancel()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask(self, receive: Receive) -> None:
        """The body; then wait for the client to go away, which closes the connection."""
        while (message := await receive())["type"] == "http.request":
            self._write(_frames(message))
            with contextlib.suppress(ConnectionError):  # the answer's end of it tells
                await self._writer.drain()
        self._gone = True
        self._writer.close()

    def _write(self, frames: bytes = b"") -> None:
        """After the head, once."""
        self._writer.write(self._head + frames)
        self._head = b""

    async def _answer(self) -> None:
        while True:
            kind, data = await read_frame(self._reader)
            if kind == _END:
                break
            if kind == _HEAD:
                await self._start(json.loads(data))
            else:
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, facts: dict[str, Any]) -> None:
        headers = _bytes(facts["headers"])
        headers += [(name, value) for name, value in self._scope["headers"] if name == b"x-request-id"]  # as Serve does
        self._streaming = any(
            value.startswith(b"text/event-stream") for name, value in headers if name == b"content-type"
        )
        self._started = True
        await self._send({"type": "http.response.start", "status": facts["status"], "headers": headers})

    async def _broken(self) -> None:
        """The gateway is gone in the middle."""
        error = ReplicaUnavailable("The gateway that answered is gone.", hint="Ask again.")
        if not self._started:
            await self._start({"status": status_of(error), "headers": [("content-type", "application/json")]})
            last = json.dumps(body_of(error)).encode()
        elif self._streaming:
            last = error_chunk(body_of(error))
        else:
            raise error  # which cuts the connection: half an object must not look like a whole one
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


# --- requests as JSON ------------------------------------------------------------------------------------------------


_PLAIN = ("type", "http_version", "method", "scheme", "path", "root_path", "client", "server")


def _facts(scope: Scope) -> dict[str, Any]:
    """What of a request the application sees, as JSON knows it."""
    facts = {name: scope[name] for name in _PLAIN if name in scope}
    query = scope.get("query_string", b"").decode("latin-1")
    return facts | {"query_string": query, "headers": _texts(scope["headers"])}


def _scope(facts: dict[str, Any]) -> Scope:
    raw = {
        "query_string": facts["query_string"].encode("latin-1"),
        "raw_path": facts["path"].encode(),
        "headers": _bytes(facts["headers"]),
    }
    return facts | raw | {"asgi": {"version": "3.0", "spec_version": "2.3"}}


def _frames(message: Message) -> bytes:
    """A piece of a body; both ends have them."""
    body, more = message.get("body", b""), message.get("more_body", False)
    return (frame(_BODY, body) if body else b"") + (b"" if more else frame(_END))


def _texts(headers: Any) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _bytes(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
