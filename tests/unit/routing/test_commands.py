"""`adaptory routes …`: what a person types and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main

PRODUCTION = ("--adapter", "acme/intents@production")


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command with --json; returns its exit code and what it printed."""
    main(["tenants", "add", "acme"])
    capsys.readouterr()

    def run(*args: str) -> tuple[int, Any]:
        code = main(["routes", *args, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def say(ask: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command; returns its exit code, and what it printed on both streams."""

    def run(*args: str) -> tuple[int, str]:
        code = main(["routes", *args])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_set_and_show(ask: Callable[..., Any], say: Callable[..., Any]):
    assert ask("list") == (0, [])
    assert "adaptory routes set" in say("list")[1]
    code, made = ask("set", "acme/intents", *PRODUCTION, "--fallback", "base")
    assert (code, made["route"], made["revision"], made["config"]["fallback"]) == (0, "acme/intents", 1, ["base"])
    assert "@" in made["created_by"]
    code, shown = ask("show", "acme/intents")
    assert (code, shown["config"], len(shown["history"])) == (0, made["config"], 1)
    for words in (("list",), ("show", "acme/intents")):
        code, text = say(*words)
        assert (code, "acme/intents@production" in text, "base" in text) == (0, True, True)


def test_what_is_not_named_stays_and_clear_takes_away(ask: Callable[..., Any], say: Callable[..., Any], tmp_path: Path):
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema, indent=1))
    (tmp_path / "system.txt").write_text("Be brief.\n")
    first = ("--system", f"@{tmp_path / 'system.txt'}", "--schema", str(tmp_path / "schema.json"))
    ask("set", "acme/intents", *PRODUCTION, *first, "--temperature", "0", "--stop", "###", "--stop", "END")
    arms = ("--adapter", "acme/intents@production=90", "--adapter", "acme/intents@4=10")
    code, changed = ask(
        "set", "acme/intents", *arms, "--top-p", "0.9", "--fallback", "acme/intents@3", "--fallback", "base"
    )
    assert (code, changed["revision"]) == (0, 2)
    config = changed["config"]
    assert [(arm["adapter"], arm["weight"]) for arm in config["adapters"]] == [
        ("acme/intents@production", 90),
        ("acme/intents@4", 10),
    ]
    assert config["fallback"] == ["acme/intents@3", "base"]
    assert config["defaults"]["system"] == "Be brief."
    assert list(config["defaults"]["json_schema"]["properties"]) == ["z", "a"]
    sampling = config["defaults"]["sampling"]
    assert (sampling["temperature"], sampling["top_p"], sampling["stop"]) == (0, 0.9, ["###", "END"])
    code, text = say("show", "acme/intents")
    for words in ("90%", "10%", "acme/intents@3, then base", "Be brief.", "temperature 0", "'###', 'END'", "History"):
        assert words in text
    cleared = ask("set", "acme/intents", "--clear", "schema", "--clear", "stop", "--fallback", "none")[1]["config"]
    assert (cleared["defaults"]["json_schema"], cleared["defaults"]["sampling"]["stop"]) == (None, [])
    assert (cleared["fallback"], cleared["defaults"]["system"]) == ([], "Be brief.")
    code, same = ask("set", "acme/intents", "--fallback", "none")
    assert (code, same["revision"]) == (0, 3)
    assert "says already" in say("set", "acme/intents", "--fallback", "none")[1]


def test_rollback(ask: Callable[..., Any], say: Callable[..., Any]):
    for number in (1, 2, 3):
        ask("set", "acme/intents", "--adapter", f"acme/intents@{number}")
    code, back = ask("rollback", "acme/intents")
    assert (code, back["revision"], back["restores"]) == (0, 4, 2)
    assert back["config"]["adapters"][0]["adapter"] == "acme/intents@2"
    code, text = say("rollback", "acme/intents", "--to", "1")
    assert (code, "is back at revision 1" in text, "acme/intents@1" in text) == (0, True, True)
    code, text = say("show", "acme/intents")
    assert (code, "revision 1 again" in text) == (0, True)
    assert ask("rollback", "acme/intents", "--to", "77")[1]["error"]["code"] == "route_not_found"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("set", "intents", *PRODUCTION), "invalid_name"),
        (("set", "acme/Intents", *PRODUCTION), "invalid_name"),
        (("set", "nobody/x", "--adapter", "nobody/x@1"), "tenant_not_found"),
        (("set", "acme/intents"), "invalid_route"),
        (("set", "acme/intents", "--fallback", "base"), "invalid_route"),
        (("set", "acme/intents", "--adapter", "acme/intents"), "invalid_route"),
        (("set", "acme/intents", "--adapter", "globex/intents@1"), "invalid_route"),
        (("set", "acme/intents", "--adapter", "acme/intents@1=0"), "invalid_route"),
        (("set", "acme/intents", "--adapter", "acme/intents@1=half"), "error"),
        (("set", "acme/intents", *PRODUCTION, "--temperature", "9"), "invalid_route"),
        (("set", "acme/intents", *PRODUCTION, "--schema", "/nowhere.json"), "error"),
        (("set", "acme/intents", *PRODUCTION, "--clear", "moon"), "error"),
        (("show", "acme/nothing"), "route_not_found"),
        (("rollback", "acme/nothing"), "route_not_found"),
        (("list", "--tenant", "nobody"), "tenant_not_found"),
    ],
)
def test_mistakes(ask: Callable[..., Any], words: tuple[str, ...], error: str):
    code, said = ask(*words)
    assert (code, said["error"]["code"]) == (2, error)
    assert said["error"]["hint"]


@pytest.mark.parametrize("word", ["list", "show", "set", "rollback"])
def test_help_has_an_example(say: Callable[..., Any], word: str):
    code, text = say(word, "--help")
    assert code == 0
    assert f"Example: adaptory routes {word}" in " ".join(text.split())
