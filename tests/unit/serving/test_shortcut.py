"""Requests on the short way, over real sockets: the middleware as Serve's proxy has it, a small application as the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from starlette.types import Message, Receive, Scope, Send

from serving.shortcut import PATHS, Door, Shortcut

T = TypeVar("T")
CHAT = PATHS[0]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ac", dir="/tmp") as made:  # a socket's path has at most 107 characters
        yield Path(made)


async def serves_way(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"Serve's way", "more_body": False})


@dataclass
class App:
    """A gateway's application."""

    pieces: list[bytes] = field(default_factory=lambda: [b"one", b"two"])
    media: bytes = b"text/event-stream; charset=utf-8"
    before: Callable[[], Awaitable[Any]] | None = None
    between: Callable[[], Awaitable[Any]] | None = None
    scope: Scope = field(default_factory=dict)
    body: bytes = b""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """The client went away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.body += message["body"]
            more = message["more_body"]
        gone = asyncio.create_task(self._gone(receive))
        if self.before is not None:
            await self.before()
        await send({"type": "http.response.start", "status": 201, "headers": [(b"content-type", self.media)]})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if self.between is not None:
                await self.between()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        gone.cancel()

    async def _gone(self, receive: Receive) -> None:
        assert (await receive())["type"] == "http.disconnect"
        self.left.set()


@dataclass
class Client:
    """What uvicorn shows an application."""

    path: str = CHAT
    body: tuple[bytes, ...] = (b"ask", b"ed")
    headers: tuple[tuple[bytes, bytes], ...] = ((b"authorization", b"Bearer k\xe9y"),)
    sent: list[Message] = field(default_factory=list)
    leaves: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, directory: Path) -> Client:
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "query_string": b"a=1",
            "headers": list(self.headers),
            "client": ("127.0.0.1", 5),
        }
        messages = [
            {"type": "http.request", "body": part, "more_body": n < len(self.body) - 1}
            for n, part in enumerate(self.body)
        ]

        async def receive() -> Message:
            if messages:
                return messages.pop(0)
            await self.leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        await Shortcut(serves_way, directory)(scope, receive, send)
        return self

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def header(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def text(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def ended(self) -> bool:
        return not self.sent[-1].get("more_body", False)


def run(what: Callable[[], Awaitable[T]]) -> T:
    return asyncio.run(asyncio.wait_for(what(), timeout=20))


async def door(app: App, directory: Path) -> Door:
    opened = Door(app, directory)
    await opened.open()
    return opened


def test_a_request_and_its_answer_arrive_as_they_are(directory: Path):
    async def ask() -> None:
        app = App()
        await door(app, directory)
        client = await Client().ask(directory)
        assert (client.status, client.text, client.ended) == (201, b"onetwo", True)
        assert client.header == {b"content-type": b"text/event-stream; charset=utf-8"}
        assert [message["body"] for message in client.sent[1:3]] == [b"one", b"two"]  # each piece by itself
        assert app.body == b"asked"
        assert (app.scope["method"], app.scope["path"], app.scope["query_string"]) == ("POST", CHAT, b"a=1")
        assert app.scope["headers"] == [(b"authorization", b"Bearer k\xe9y")]

    run(ask)


def test_a_body_that_does_not_come_is_the_gateways_to_judge(directory: Path):
    async def ask() -> None:
        app, client = App(), Client(body=())
        await door(app, directory)
        asked = asyncio.create_task(client.ask(directory))
        while not app.scope:
            await asyncio.sleep(0.01)
        client.leaves.set()
        await asked

    run(ask)


def test_a_request_without_a_body(directory: Path):
    async def ask() -> None:
        app = App()
        await door(app, directory)
        assert (await Client(body=(b"",)).ask(directory)).text == b"onetwo"
        assert app.body == b""

    run(ask)


def test_an_id_that_the_client_chose_is_in_the_answer_as_serve_has_it(directory: Path):
    async def ask() -> None:
        await door(App(), directory)
        client = await Client(headers=((b"x-request-id", b"mine"),)).ask(directory)
        assert client.header[b"x-request-id"] == b"mine"

    run(ask)


def test_other_paths_and_a_machine_without_a_gateway_go_serves_way(directory: Path):
    async def ask() -> None:
        assert (await Client().ask(directory)).text == b"Serve's way"
        assert (await Client().ask(directory / "cleaned-up")).text == b"Serve's way"
        await door(App(), directory)
        assert (await Client(path="/v1/models").ask(directory)).text == b"Serve's way"
        assert (await Client().ask(directory)).text == b"onetwo"

    run(ask)


def test_a_gateway_that_was_killed_is_forgotten(directory: Path):
    path = directory / "999.http"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    async def ask() -> None:
        assert (await Client().ask(directory)).text == b"Serve's way"
        assert not path.exists()

    run(ask)


def test_a_client_that_goes_away_is_noticed_by_the_application(directory: Path):
    async def ask() -> None:
        app, client = App(), Client()
        app.between = app.left.wait
        await door(app, directory)
        asked = asyncio.create_task(client.ask(directory))
        while not client.sent:
            await asyncio.sleep(0.01)
        client.leaves.set()
        await app.left.wait()
        await asked
        assert b"gone" not in client.text

    run(ask)


def test_a_proxy_whose_task_is_cancelled_leaves_the_application(directory: Path):
    async def ask() -> None:
        app, client = App(), Client()
        app.between = app.left.wait
        await door(app, directory)
        asked = asyncio.create_task(client.ask(directory))
        while not client.sent:
            await asyncio.sleep(0.01)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        await app.left.wait()

    run(ask)


async def _dies() -> None:
    raise RuntimeError("a gateway that is gone looks like this from outside")


def test_a_stream_whose_gateway_dies_ends_with_an_error(directory: Path):
    async def ask() -> None:
        await door(App(between=_dies), directory)
        client = await Client().ask(directory)
        first, last = client.text.split(b"data: ")
        assert (first, client.ended) == (b"one", True)
        assert json.loads(last)["error"]["code"] == "replica_unavailable"

    run(ask)


def test_a_gateway_that_dies_before_it_answers_is_a_503(directory: Path):
    async def ask() -> None:
        await door(App(before=_dies), directory)
        client = await Client(headers=((b"x-request-id", b"mine"),)).ask(directory)
        assert (client.status, client.ended) == (503, True)
        assert json.loads(client.text)["error"]["code"] == "replica_unavailable"
        assert client.header[b"x-request-id"] == b"mine"

    run(ask)


def test_half_of_a_whole_answer_is_cut_and_not_ended(directory: Path):
    async def ask() -> None:
        await door(App(media=b"application/json", between=_dies), directory)
        client = Client()
        with pytest.raises(Exception, match="is gone"):
            await client.ask(directory)
        assert not client.ended

    run(ask)


def test_a_door_that_closes_finishes_what_had_begun_and_takes_nothing_new(directory: Path):
    async def ask() -> None:
        going_on = asyncio.Event()
        app = App(between=going_on.wait)
        closing, begun = await door(app, directory), Client()
        asked = asyncio.create_task(begun.ask(directory))
        while not begun.sent:
            await asyncio.sleep(0.01)
        closed = asyncio.create_task(closing.close())
        await asyncio.sleep(0.01)
        assert (await Client().ask(directory)).text == b"Serve's way"
        await asyncio.sleep(0.3)
        assert not closed.done()
        going_on.set()
        assert (await asked).text == b"onetwo"
        await closed

    run(ask)


def test_a_process_that_got_the_number_of_one_that_was_killed_opens_all_the_same(directory: Path):
    (directory / f"{os.getpid()}.http").touch()

    async def ask() -> None:
        await door(App(), directory)
        assert (await Client().ask(directory)).text == b"onetwo"

    run(ask)
