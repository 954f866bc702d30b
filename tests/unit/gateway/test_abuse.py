"""Clients that mean harm, over real sockets: bodies that never end, guesses of keys, answers nobody reads. About 15 seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import event

from orchestrator.db.models import ApiKeyRow
from orchestrator.errors import InvalidRequest
from orchestrator.names import shown
from orchestrator.tenants.keys import create_key, revoke_key
from serving.gateway.gateway import Bounds
from serving.gateway.requests import ChatRequest, CompletionRequest, parse
from tests.gateway_process import served

PATH = "/v1/chat/completions"
CHAT = {"model": "acme/intents", "messages": [{"role": "user", "content": "What is it?"}]}


@pytest.fixture
def port(world) -> Iterator[int]:
    with served(world.app) as port:
        yield port


class Client:
    """A socket, so that every byte is ours."""

    def __init__(self, port: int, key: str | None = None):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._key = key
        self._got = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def head(self, *, method: str = "POST", path: str = PATH, **headers: Any) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {self._key}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def ask(self, body: Any = CHAT) -> None:
        data = json.dumps(body).encode()
        self.head(Content_Length=len(data))
        self.send(data)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer; the body must say its length."""
        while b"\r\n\r\n" not in self._got:
            self._more()
        head, _, self._got = self._got.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers["content-length"])
        while len(self._got) < length:
            self._more()
        body, self._got = self._got[:length], self._got[length:]
        return int(first.split()[1]), headers, body

    def code(self) -> tuple[int, str]:
        status, _, body = self.answer()
        return status, json.loads(body)["error"]["code"]

    def closed(self) -> bool:
        """Whether the server ends the connection."""
        with contextlib.suppress(ConnectionError):
            while self._socket.recv(65_536):
                pass
        return True

    def _more(self) -> None:
        data = self._socket.recv(65_536)
        assert data, f"the server closed the connection after {self._got!r}"
        self._got += data


@pytest.fixture
def client(world, port: int) -> Iterator[Client]:
    with Client(port, world.keys["acme"]) as made:
        yield made


def answered(world, port: int) -> bool:
    """Whether somebody else is, meanwhile."""
    with Client(port, world.keys["globex"]) as other:
        other.ask(CHAT | {"model": "globex/router"})
        return other.answer()[0] == 200


# --- bodies ---------------------------------------------------------------------------------------------------------


def test_many_slow_bodies_and_heads_hold_nobody_up(world, port: int):
    with contextlib.ExitStack() as stack:
        heads = [stack.enter_context(Client(port)) for _ in range(100)]
        for client in heads:
            client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: gate")
        bodies = [stack.enter_context(Client(port, world.keys["acme"])) for _ in range(40)]
        for client in bodies:
            client.head(Content_Length=1000)
            client.send(b'{"model"')
        assert answered(world, port)
        for _ in range(20):
            time.sleep(0.05)
            for client in bodies:
                with contextlib.suppress(ConnectionError):
                    client.send(b" ")
        assert [client.code() for client in bodies] == [(408, "request_timeout")] * 40
        assert answered(world, port)
    assert world.limiter.in_flight("acme") == 0


def test_a_body_too_large_is_refused_before_it_is_there(client: Client):
    client.head(Content_Length=1 << 40)
    assert client.code() == (413, "request_too_large")
    assert client.closed()


def test_a_body_that_does_not_say_its_length_is_cut_off(client: Client):
    client.head(Transfer_Encoding="chunked")
    with contextlib.suppress(ConnectionError):
        for _ in range(30):
            client.send(b"400\r\n" + b" " * 1024 + b"\r\n")
    assert client.code() == (413, "request_too_large")
    assert client.closed()


def test_all_bodies_together_have_a_bound(world, port: int):
    object.__setattr__(world.gateway, "bounds", Bounds(body_bytes=20_000, body_seconds=1.0, bodies_bytes=50_000))
    with contextlib.ExitStack() as stack:
        bodies = [stack.enter_context(Client(port, world.keys["acme"])) for _ in range(8)]
        for client in bodies:
            client.head(Content_Length=19_000)
            client.send(b" " * 10_000)
        codes = sorted(client.code() for client in bodies)
    assert codes == [(408, "request_timeout")] * 5 + [(429, "engine_overloaded")] * 3
    assert world.gateway.arriving.bytes == 0
    assert answered(world, port)


@pytest.mark.parametrize("half", [{"Content_Length": 5000}, {"Transfer_Encoding": "chunked"}])
def test_a_body_that_breaks_off(world, port: int, half: dict[str, Any], caplog: pytest.LogCaptureFixture):
    for _ in range(20):
        with Client(port, world.keys["acme"]) as client:
            client.head(**half)
            client.send(b'10\r\n{"model": "acme/\r\n')
    assert answered(world, port)
    assert len(world.engine.asked) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00" * 1000,
    ],
)
def test_what_is_no_http(world, port: int, data: bytes):
    with Client(port) as client:
        client.send(data)
        client._socket.shutdown(socket.SHUT_WR)
        assert client.closed()
    assert answered(world, port)


def test_many_headers(world, port: int):
    with Client(port, world.keys["acme"]) as client, contextlib.suppress(ConnectionError):
        client.head(method="GET", path="/v1/models", **{f"X_{n}": "x" * 100 for n in range(5000)})
        assert client.answer()[0] in (200, 400, 431)
    assert answered(world, port)


def test_requests_in_a_pipeline_are_answered_in_their_order(client: Client):
    bodies: list[Any] = [CHAT, {"model": "tiny"}, CHAT | {"model": "acme/nothing"}, CHAT]
    for body in bodies:
        client.ask(body)
    answers = [client.answer() for _ in bodies]
    assert [status for status, _, _ in answers] == [200, 400, 404, 200]
    assert len({headers["x-request-id"] for _, headers, _ in answers}) == 4


def test_a_pipeline_that_is_left_alone(world, port: int):
    """Ten requests, and nobody waits for an answer."""
    world.engine.slowly = 0.05
    with Client(port, world.keys["acme"]) as client:
        for _ in range(10):
            client.ask(CHAT | {"stream": True})
    until(lambda: world.limiter.in_flight("acme") == 0)
    assert answered(world, port)


def until(holds: Any) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- items ----------------------------------------------------------------------------------------------------------

MANY = 400_000
WRONG: dict[str, tuple[type, Any]] = {
    "prompt": (CompletionRequest, {"model": "m", "prompt": [None] * MANY}),
    "prompt tokens": (CompletionRequest, {"model": "m", "prompt": [1] * MANY}),
    "prompts": (CompletionRequest, {"model": "m", "prompt": [[]] * MANY}),
    "stop": (CompletionRequest, {"model": "m", "prompt": "a", "stop": [1] * MANY}),
    "messages": (ChatRequest, CHAT | {"messages": [{}] * MANY}),
    "parts": (ChatRequest, CHAT | {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    "fields": (ChatRequest, CHAT | {f"f{n}": 1 for n in range(MANY)}),
    "fields of a message": (ChatRequest, CHAT | {"messages": [{f"f{n}": 1 for n in range(MANY)}]}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_million_mistakes_cost_no_more_than_one(case: str):
    """Each is checked on the event loop, where all others wait for it. Complaining of each item took up to ten seconds."""
    kind, body = WRONG[case]
    with pytest.raises(InvalidRequest) as refused:
        parse(kind, body)
    assert isinstance(refused.value.__cause__, ValidationError)
    assert refused.value.__cause__.error_count() < 10


# --- clients that do not read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_who_never_reads_is_given_up(world, stream: bool):
    """The transport takes nothing any more: the request gives back what it holds, and is not counted as failed."""
    object.__setattr__(world.gateway, "bounds", Bounds(send_seconds=0.2))
    body = json.dumps(CHAT | {"stream": stream}).encode()
    headers = [(b"authorization", f"Bearer {world.keys['acme']}".encode())]
    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b""}
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "server": ("gateway", 80), "root_path": ""}
    received = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        for message in received:
            return message
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def ask() -> float:
        start = time.monotonic()
        await asyncio.wait_for(world.app(scope, receive, send), timeout=10)
        return time.monotonic() - start

    assert 0.2 <= asyncio.run(ask()) < 5
    assert world.limiter.in_flight("acme") == 0
    assert len(world.engine.closed) == 1
    text = world.ask("/metrics", tenant=None, method="GET")
    assert text.status_code == 401  # and nothing of it is told without the key


# --- keys -----------------------------------------------------------------------------------------------------------


def test_guesses_and_old_keys_are_refused_alike(world, port: int, caplog: pytest.LogCaptureFixture):
    """To the last byte but the request's id; and for one query each, as a valid key."""
    caplog.set_level(logging.DEBUG)
    revoked, expired = (create_key(world.db, "acme", name, actor="test") for name in ("revoked", "expired"))
    revoke_key(world.db, "revoked", tenant="acme", actor="test")
    with world.db.write() as session:
        row = session.get(ApiKeyRow, expired.key.id)
        assert row is not None
        row.expires_at = time.time() - 1
    wrong = "A" * 43
    presented = {
        "unknown": f"ak-{'a' * 12}-{wrong}",
        "wrong secret": f"ak-{revoked.key.id}-{wrong}",
        "another's secret": world.keys["acme"][:15] + world.keys["globex"][15:],
        "revoked": revoked.secret,
        "expired": expired.secret,
    }
    statements: list[str] = []
    event.listen(world.db.engine, "before_cursor_execute", lambda *called: statements.append(called[2]))
    seen, costs = set(), set()
    for key in presented.values():
        with Client(port, key) as client:
            statements.clear()
            client.head(method="GET", path="/v1/models")
            status, headers, body = client.answer()
            del headers["x-request-id"], headers["date"]
            seen.add((status, tuple(headers.items()), body))
            costs.add(len([s for s in statements if s.startswith("SELECT")]))
    assert len(seen) == 1
    assert next(iter(seen))[0] == 401
    assert costs == {1}
    with Client(port, world.keys["acme"]) as client:
        statements.clear()
        client.head(method="GET", path="/v1/models")
        assert client.answer()[0] == 200
        assert len([s for s in statements if s.startswith("SELECT")]) == 1
    for name, key in presented.items():
        assert key[16:] not in caplog.text, name
    logged = [json.loads(r.message) for r in caplog.records if r.name == "serving.requests"]
    assert [(line.get("key"), line.get("state")) for line in logged if line["status"] == 401][-2:] == [
        (revoked.key.id, "revoked"),
        (expired.key.id, "expired"),
    ]


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/models/{}"])
@pytest.mark.parametrize("suffix", ["", "@1", "@production", "@sha256:" + "1" * 64])
def test_another_tenants_model_is_an_unknown_one(world, port: int, path: str, suffix: str):
    """To the last byte but its name, which is as long."""
    seen = set()
    for name in ("globex/router", "globex/nobody", "nobody/router"):
        model = name + suffix
        with Client(port, world.keys["acme"]) as client:
            if path.endswith("{}"):
                client.head(method="GET", path=path.format(model.replace("/", "%2F")))
            else:
                body: dict[str, Any] = (
                    {"model": model, "prompt": "x"} if "chat" not in path else CHAT | {"model": model}
                )
                data = json.dumps(body).encode()
                client.head(path=path, Content_Length=len(data))
                client.send(data)
            status, headers, answer = client.answer()
        del headers["x-request-id"], headers["date"]
        named = json.dumps(shown(model))[1:-1].encode()  # a long one is cut, with an ellipsis that JSON escapes
        seen.add((status, tuple(headers.items()), answer.replace(named, b"MODEL")))
    assert len(seen) == 1
    assert next(iter(seen))[0] == 404
    assert world.engine.asked == []


def test_a_flood_of_guesses_leaves_others_their_answers(world, port: int):
    def guess(number: int) -> int:
        with Client(port, f"ak-{'a' * 12}-{number:043d}") as client:
            for _ in range(20):
                client.ask()
                status = client.answer()[0]
        return status

    with ThreadPoolExecutor(16) as pool:
        guesses = [pool.submit(guess, number) for number in range(64)]
        while not all(each.done() for each in guesses):
            assert answered(world, port)
        assert {each.result() for each in guesses} == {401}
