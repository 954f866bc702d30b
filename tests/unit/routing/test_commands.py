"""`adaptory routes …`: what a person types and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.commands.backend import complete_route, complete_version
from orchestrator.commands.routes import complete_fallback
from orchestrator.db import open_database
from orchestrator.db.audit import entries
from orchestrator.registry.versions import Reference, find_version, move_alias

PRODUCTION = ("--adapter", "acme/intents@production")


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], home: Path, register_adapter: Callable[..., None]) -> Callable[..., Any]:
    """Run the command with --json; returns its exit code and what it printed. acme/intents has versions 1 to 4, of which
    production names the third and stable the first; acme/foreign@1 belongs to another base."""
    main(["tenants", "add", "acme"])
    db = open_database(f"sqlite:///{home / 'state.db'}")
    for number in (1, 2, 3, 4):
        register_adapter(db, "acme/intents", f"sha256:{number:064x}", "sha256:" + "b1" * 32)
    register_adapter(db, "acme/foreign", f"sha256:{9:064x}", "sha256:" + "b2" * 32)
    for number, alias in (("3", "production"), ("1", "stable")):
        version = find_version(db, Reference(tenant="acme", name="intents", selector=number))
        move_alias(db, version, alias, actor="ada")
    db.close()
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


def test_delete_and_bring_back(ask: Callable[..., Any], say: Callable[..., Any], home: Path):
    ask("set", "acme/intents", "--adapter", "acme/intents@1")
    ask("set", "acme/intents", *PRODUCTION, "--fallback", "previous", "--fallback", "base")
    assert ask("delete", "acme/intents", "--expect", "1")[1]["error"]["code"] == "route_conflict"
    code, gone = ask("delete", "acme/intents", "--expect", "2")
    assert (code, gone["deleted"], gone["route"], gone["revision"]) == (0, True, "acme/intents", 2)
    assert ask("list") == (0, [])
    for words in (("show", "acme/intents"), ("delete", "acme/intents")):
        code, said = ask(*words)
        assert (code, said["error"]["code"]) == (2, "route_not_found")
        assert "adaptory routes rollback acme/intents" in said["error"]["hint"]
    code, back = ask("rollback", "acme/intents")
    assert (code, back["revision"], back["restores"], back["config"]) == (0, 3, 2, gone["config"])
    code, text = say("delete", "acme/intents")
    assert (code, "Route acme/intents is deleted" in text) == (0, True)
    assert ask("set", "acme/intents", "--adapter", "acme/intents@2")[1]["revision"] == 4, "a number is never used twice"
    db = open_database(f"sqlite:///{home / 'state.db'}")
    trail = [
        (each.action, each.before and each.before["revision"], each.after and each.after["revision"])
        for each in entries(db, subject="acme/intents")
    ]
    assert trail[::-1] == [
        ("route.set", None, 1),
        ("route.set", 1, 2),
        ("route.delete", 2, None),
        ("route.rollback", None, 3),
        ("route.delete", 3, None),
        ("route.set", None, 4),
    ]
    db.close()


def test_the_shell_knows_routes_and_versions(ask: Callable[..., Any]):
    ask("set", "acme/intents", *PRODUCTION)
    ask("set", "acme/old", *PRODUCTION)
    ask("delete", "acme/old")
    assert complete_route("acme/") == ["acme/intents"]
    assert complete_version("acme/intents@p") == ["acme/intents@production"]
    assert len(complete_version("acme/intents@")) == 6
    assert complete_fallback("pre") == ["previous"]
    assert complete_fallback("acme/f") == ["acme/foreign@1"]


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
        (("set", "acme/intents", "--adapter", "acme/intents@9"), "invalid_route"),
        (("set", "acme/intents", "--adapter", "acme/intents@staging"), "invalid_route"),
        (("set", "acme/intents", *PRODUCTION, "--adapter", "acme/foreign@1"), "invalid_route"),
        (("set", "acme/intents", *PRODUCTION, "--fallback", "acme/foreign@1"), "invalid_route"),
        (("set", "acme/intents", "--base", "tiny", "--fallback", "previous"), "invalid_route"),
        (("set", "acme/intents", "--adapter", "acme/intents@1=0"), "invalid_route"),
        (("set", "acme/intents", "--adapter", "acme/intents@1=half"), "usage"),
        (("set", "acme/intents", *PRODUCTION, "--temperature", "9"), "invalid_route"),
        (("set", "acme/intents", *PRODUCTION, "--schema", "/nowhere.json"), "usage"),
        (("set", "acme/intents", *PRODUCTION, "--clear", "moon"), "usage"),
        (("show", "acme/nothing"), "route_not_found"),
        (("rollback", "acme/nothing"), "route_not_found"),
        (("delete", "acme/nothing"), "route_not_found"),
        (("delete", "nothing"), "invalid_name"),
        (("list", "--tenant", "nobody"), "tenant_not_found"),
    ],
)
def test_mistakes(ask: Callable[..., Any], words: tuple[str, ...], error: str):
    code, said = ask(*words)
    assert (code, said["error"]["code"]) == (2, error)
    assert said["error"]["hint"]


@pytest.mark.parametrize("word", ["list", "show", "set", "rollback", "delete"])
def test_help_has_an_example(say: Callable[..., Any], word: str):
    code, text = say(word, "--help")
    assert code == 0
    assert f"Example: adaptory routes {word}" in " ".join(text.split())
