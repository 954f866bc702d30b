"""`adaptory tenants | keys | usage`: what a person types and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.db import open_database
from orchestrator.db.audit import entries
from orchestrator.errors import ApiKeyRefused
from orchestrator.tenants import keys
from orchestrator.tenants.usage import UsageWriter


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command with --json; returns its exit code and what it printed."""

    def run(*args: str) -> tuple[int, Any]:
        code = main([*args, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command; returns its exit code, and what it printed on both streams."""

    def run(*args: str) -> tuple[int, str]:
        code = main(list(args))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_tenants(ask: Callable[..., Any], say: Callable[..., Any]):
    assert ask("tenants", "list") == (0, [])
    assert "adaptory tenants add" in say("tenants", "list")[1]
    code, made = ask("tenants", "add", "acme", "--requests-per-minute", "600", "--tokens-per-minute", "200000")
    quota = {"requests_per_minute": 600, "tokens_per_minute": 200000, "concurrent_requests": None}
    assert (code, made["quota"]) == (0, quota)
    code, changed = ask("tenants", "set", "acme", "--tokens-per-minute", "none", "--concurrent-requests", "16")
    quota |= {"tokens_per_minute": None, "concurrent_requests": 16}
    assert (code, changed["quota"]) == (0, quota)
    assert ask("tenants", "show", "acme")[1]["quota"] == quota
    code, text = say("tenants", "list")
    assert (code, "acme" in text, "no limit" in text, "600" in text) == (0, True, True, True)
    assert "no limit" in say("tenants", "show", "acme")[1]


def test_disable_enable_and_delete(ask: Callable[..., Any], say: Callable[..., Any], home: Path):
    ask("tenants", "add", "acme")
    secret = ask("keys", "create", "--tenant", "acme", "--name", "laptop")[1]["key"]
    db = open_database(f"sqlite:///{home / 'state.db'}")
    code, disabled = ask("tenants", "disable", "acme")
    assert (code, disabled["disabled_at"] > 0) == (0, True)
    with pytest.raises(ApiKeyRefused, match="tenant acme is disabled"):
        keys.authenticate(db, secret)
    assert "disabled" in say("tenants", "list")[1]
    assert "disabled since" in say("tenants", "show", "acme")[1]
    assert ask("tenants", "disable", "acme")[1] == disabled, "again changes nothing"
    assert ask("tenants", "enable", "acme")[1]["disabled_at"] is None
    assert keys.authenticate(db, secret).tenant.name == "acme"
    assert "is enabled" in say("tenants", "enable", "acme")[1]

    code, refused = ask("tenants", "delete", "acme")
    assert (code, refused["error"]["code"], refused["error"]["owns"]) == (1, "tenant_in_use", {"keys": 1})
    assert "adaptory keys revoke" in refused["error"]["hint"]
    ask("keys", "revoke", "laptop")
    code, gone = ask("tenants", "delete", "acme")
    assert (code, gone["deleted"], gone["name"]) == (0, True, "acme")
    assert ask("tenants", "list") == (0, [])
    assert ask("tenants", "delete", "acme")[1]["error"]["code"] == "tenant_not_found"
    trail = [each.action for each in entries(db, subject="acme")][::-1]
    assert trail == ["tenant.add", "tenant.disable", "tenant.enable", "tenant.delete"]
    ask("tenants", "add", "acme")
    assert "Tenant acme is deleted." in say("tenants", "delete", "acme")[1]
    db.close()


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("tenants", "add", "Acme!"), 2, "invalid_name"),
        (("tenants", "disable", "nobody"), 2, "tenant_not_found"),
        (("tenants", "enable", "nobody"), 2, "tenant_not_found"),
        (("tenants", "delete", "nobody"), 2, "tenant_not_found"),
        (("tenants", "show", "nobody"), 2, "tenant_not_found"),
        (("tenants", "set", "acme"), 2, "tenant_error"),
        (("tenants", "set", "acme", "--requests-per-minute", "-1"), 2, "usage"),
        (("tenants", "set", "acme", "--requests-per-minute", "many"), 2, "usage"),
        (("keys", "create", "--name", "x", "--tenant", "nobody"), 2, "tenant_not_found"),
        (("keys", "create", "--name", "x", "--scope", "root"), 2, "usage"),
        (("keys", "create", "--name", "x", "--expires-in", "soon"), 2, "usage"),
        (("keys", "revoke", "nothing"), 2, "api_key_not_found"),
        (("keys", "rotate", "nothing"), 2, "api_key_not_found"),
        (("usage", "--by", "moon"), 2, "usage"),
        (("usage", "--since", "yesterday"), 2, "usage"),
        (("usage", "--tenant", "nobody"), 2, "tenant_not_found"),
    ],
)
def test_mistakes(ask: Callable[..., Any], words: tuple[str, ...], code: int, error: str):
    got, said = ask(*words)
    assert (got, said["error"]["code"]) == (code, error)
    assert said["error"]["message"]


def test_keys(ask: Callable[..., Any], say: Callable[..., Any], home: Path, capsys: pytest.CaptureFixture[str]):
    """A key of this machine's own tenant needs nothing else; it is shown once and works."""
    code, made = ask("keys", "create", "--name", "laptop", "--scope", "inference", "--scope", "admin")
    assert (code, made["tenant"], made["scopes"], made["state"]) == (0, "default", ["admin", "inference"], "active")
    db = open_database(f"sqlite:///{home / 'state.db'}")
    assert keys.authenticate(db, made["key"]).tenant.name == "default"
    code, new = ask("keys", "rotate", "laptop", "--grace", "1h")
    assert (code, new["name"]) == (0, "laptop")
    keys.authenticate(db, made["key"])
    assert [key["state"] for key in ask("keys", "list")[1]] == ["rotated", "active"]
    code, text = say("keys", "list")
    assert (code, made["id"] in text, "laptop" in text) == (0, True, True)
    code, gone = ask("keys", "revoke", "laptop")
    assert (code, gone["id"], gone["state"]) == (0, new["id"], "revoked")
    with pytest.raises(ApiKeyRefused):
        keys.authenticate(db, new["key"])
    db.close()
    for shown in (say("keys", "list"), say("keys", "list", "--json"), say("tenants", "show", "default", "--json")):
        assert made["key"][-43:] not in shown[1]
        assert new["key"][-43:] not in shown[1]
    capsys.readouterr()
    assert main(["keys", "create", "--name", "second"]) == 0
    printed = capsys.readouterr()
    assert keys.secrets.is_key(printed.out.strip()), "the key alone, for $(…)"
    assert "not shown again" in printed.err
    assert printed.out.strip() not in printed.err


def test_a_key_typed_in_the_wrong_place_is_not_repeated(
    ask: Callable[..., Any], say: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = ask("keys", "create", "--name", "laptop")[1]["key"]
    for words in (
        ("keys", "rotate", "other", "--tenant", secret),
        ("keys", secret),
        ("tenants", "show", secret),
        ("tenants", "add", secret),
        ("usage", "--since", secret),
        ("keys", "create", "--name", secret),
    ):
        for extra in ((), ("--json",)):
            code, text = say(*words, *extra)
            assert code == 2
            assert secret[-43:-4] not in text
    assert say("keys", "revoke", secret)[0] == 0, "but it does name the key"

    def crash(*args: Any, **options: Any) -> None:
        raise ValueError(f"cannot use {secret}")

    monkeypatch.setattr("sys.argv", ["adaptory", "keys", "revoke", secret])
    monkeypatch.setattr(keys, "revoke_key", crash)
    monkeypatch.setenv("ADAPTORY_DEBUG", "1")
    code, text = say("keys", "revoke", secret)
    (path,) = (home / "logs").glob("crash-*.txt")
    assert code == 1
    assert "cannot use ak-" in path.read_text()
    for shown in (text, path.read_text()):
        assert secret[-43:] not in shown


def test_usage(ask: Callable[..., Any], say: Callable[..., Any], home: Path):
    digest = "sha256:" + "ab" * 32
    ask("tenants", "add", "acme")
    assert ask("usage") == (0, [])
    assert "Nothing was used" in say("usage")[1]
    db = open_database(f"sqlite:///{home / 'state.db'}")
    writer = UsageWriter(db)
    writer.add("acme", "acme/intents", digest, tokens_in=1200, tokens_out=34)
    writer.add("acme", "acme/intents", None, tokens_in=1, tokens_out=1)
    writer.flush()
    db.close()
    code, rows = ask("usage", "--tenant", "acme", "--since", "1d", "--by", "route", "--by", "tenant")
    assert (code, rows) == (
        0,
        [{"tenant": "acme", "route": "acme/intents", "requests": 2, "tokens_in": 1201, "tokens_out": 35}],
    )
    code, text = say("usage", "--by", "adapter", "--by", "hour")
    assert (code, digest[7:19] in text, "base" in text, "1,200" in text) == (0, True, True, True)


@pytest.mark.parametrize(
    "words",
    [("tenants", each) for each in ("list", "show", "add", "set", "disable", "enable", "delete")]
    + [("keys", each) for each in ("list", "create", "rotate", "revoke")]
    + [("usage",)],
)
def test_help_has_an_example(say: Callable[..., Any], words: tuple[str, ...]):
    code, text = say(*words, "--help")
    assert code == 0
    assert f"Example: adaptory {' '.join(words)}" in " ".join(text.split())
