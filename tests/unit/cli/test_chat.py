"""`adaptory chat` against an endpoint that a test plays. About two seconds."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.db import open_database
from orchestrator.limits.quota import Quota
from orchestrator.settings import Settings
from orchestrator.tenants.keys import KeyState, authenticate, list_keys
from orchestrator.tenants.tenant import add_tenant


@dataclass
class Endpoint:
    """Streams `words`, or refuses with `status`."""

    url: str = ""
    words: tuple[str, ...] = ("Grüß", " Gott")
    status: int = 200
    breaks: bool = False
    fallback: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> bytes:
        if self.status != 200:
            return json.dumps({"error": {"message": "The model x does not exist.", "code": "model_not_found"}}).encode()
        if not body.get("stream"):
            return json.dumps({"choices": [{"message": {"content": "".join(self.words)}}]}).encode()
        chunks: list[Any] = [{"choices": [{"delta": {"content": word}}]} for word in self.words]
        chunks += [
            {"error": {"message": "The replica is gone.", "code": "x"}} if self.breaks else {"choices": [{"delta": {}}]}
        ]
        lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
        return "".join(lines + ([] if self.breaks else ["data: [DONE]\n\n"])).encode()


@pytest.fixture
def endpoint(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    made, db = Endpoint(), open_database(Settings().database)
    for tenant in ("acme", "default"):
        add_tenant(db, tenant, Quota(), actor="test")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append(body)
            key = self.headers["Authorization"].removeprefix("Bearer ")
            made.tenants.append(key if key == "given" else authenticate(db, key).tenant.name)
            data = made.answer(body)
            self.send_response(made.status)
            self.send_header("x-adaptory-fallback", str(made.fallback).lower())
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    monkeypatch.setenv("ADAPTORY_API_URL", made.url)
    yield made
    server.shutdown()
    server.server_close()
    thread.join()
    db.close()


def test_one_question(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["chat", "acme/intents", "-m", "Hello", "--temperature", "0", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "Grüß Gott\n"
    assert endpoint.asked == [
        {
            "model": "acme/intents",
            "temperature": 0.0,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            "stream": True,
        }
    ]


def test_the_key_is_the_tenants_made_for_the_conversation_and_revoked_after_it(endpoint: Endpoint):
    cli.main(["chat", "acme/intents", "-m", "Hello"])
    cli.main(["chat", "smollm2-135m-instruct", "-m", "Hello"])
    assert endpoint.tenants == ["acme", "default"]
    keys = list_keys(open_database(Settings().database))
    assert [key.state() for key in keys] == [KeyState.REVOKED] * 2


def test_a_key_that_is_given_is_taken(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADAPTORY_API_KEY", "given")
    cli.main(["chat", "acme/intents", "-m", "Hello"])
    assert endpoint.tenants == ["given"]
    assert list_keys(open_database(Settings().database)) == []


def test_a_conversation(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    said = iter(["Hello", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert cli.main(["chat", "acme/intents"]) == 0
    assert [message["content"] for message in endpoint.asked[1]["messages"]] == ["Hello", "Grüß Gott", "And now?"]
    assert capsys.readouterr().out == "Grüß Gott\nGrüß Gott\n"


def test_json(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["chat", "acme/intents", "-m", "Hello", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["choices"][0]["message"]["content"] == "Grüß Gott"


def test_refusals_and_answers_that_break_off(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    endpoint.breaks = True
    assert cli.main(["chat", "acme/intents", "-m", "Hello"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "Grüß Gott\n"
    assert "The replica is gone." in captured.err
    endpoint.status = 404
    assert cli.main(["chat", "acme/x", "-m", "Hello"]) == 1
    assert "The model x does not exist." in capsys.readouterr().err


def test_a_fallback_is_told(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    endpoint.fallback = True
    cli.main(["chat", "acme/intents", "-m", "Hello"])
    assert "a fallback answers" in capsys.readouterr().err


def test_nothing_is_served(home: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["chat", "acme/intents", "-m", "Hello"]) == 1
    assert "adaptory up" in capsys.readouterr().err
