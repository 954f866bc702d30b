"""`adaptory adapters import | promote | versions | history | diff | sign` over a real store and database (5 s)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.modeling.base_model import BaseModel
from orchestrator.registry.adapters import publish_adapter
from orchestrator.registry.provenance import Provenance
from orchestrator.store import Store, adapter_path

Ask = Callable[..., Any]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run the command with --json; returns its exit code and what it printed."""

    def run(*args: object) -> tuple[int, Any]:
        capsys.readouterr()
        code = main(["adapters", *map(str, args), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command for a person; returns what it printed, in one line."""

    def run(*args: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["adapters", *map(str, args)]) == code
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    return run


@pytest.fixture
def two(ask: Ask, trained: Callable[..., Path]) -> list[str]:
    """Digests of acme/intents@1 and @2."""
    answers = [ask("import", trained(seed), "--as", "acme/intents") for seed in (0, 1)]
    assert [(code, said["reference"]) for code, said in answers] == [(0, "acme/intents@1"), (0, "acme/intents@2")]
    return [said["digest"] for _, said in answers]


def test_the_life_of_an_alias(two: list[str], ask: Ask, tell: Callable[..., str]) -> None:
    assert ask("promote", "acme/intents@1", "production", "--expect", 0)[0] == 0
    code, moved = ask("promote", "acme/intents@2", "production", "--expect", 1)
    assert (code, moved["before"], moved["after"], moved["digest"]) == (0, 1, 2, two[1])
    code, said = ask("promote", "acme/intents@1", "production", "--expect", 1)
    assert (code, said["error"]["code"], said["error"]["found"]) == (1, "alias_moved", 2)
    assert ask("promote", "acme/intents@production", "production")[1]["moved"] is False
    assert "names version 1 now; it was version 2" in tell("promote", "acme/intents@1", "production")
    assert "names version 1 already" in tell("promote", "acme/intents@1", "production")

    code, listed = ask("versions", "acme/intents")
    assert [(v["reference"], v["aliases"], v["digest"]) for v in listed] == [
        ("acme/intents@2", [], two[1]),
        ("acme/intents@1", ["production"], two[0]),
    ]
    assert ask("versions")[1] == listed
    assert [v["number"] for v in ask("versions", "acme/intents@production")[1]] == [1]
    assert ask("versions", "--tenant", "other") == (0, [])
    assert "acme/intents@1 production" in tell("versions", "acme/intents")

    code, entries = ask("history", "acme/intents@production")
    assert [(e["before"], e["after"]) for e in entries] == [(2, 1), (1, 2), (None, 1)]
    assert all(entry["actor"] and entry["created_at"] for entry in entries)
    assert len(ask("history", "acme/intents")[1]) == 5
    assert len(ask("history", "acme/intents", "--limit", 2)[1]) == 2
    assert "alias.move acme/intents@production 2 1" in tell("history", "acme/intents@production")


def test_every_command_takes_every_name(two: list[str], ask: Ask, tell: Callable[..., str], tmp_path: Path) -> None:
    ask("promote", "acme/intents@1", "production")
    for reference, digest in (
        ("acme/intents@1", two[0]),
        ("acme/intents@production", two[0]),
        (f"acme/intents@{two[1][:20]}", two[1]),
        ("acme/intents", two[1]),
        ("intents", two[1]),
        (two[0][7:15], two[0]),
    ):
        assert ask("show", reference)[1]["digest"] == digest
        assert ask("verify", reference)[1]["digest"] == digest
    assert ask("show", "acme/intents@1")[1]["versions"][0]["aliases"] == ["production"]
    text = tell("show", "acme/intents@1")
    assert "acme/intents@1 (production)" in text
    assert "imported by" in text
    assert ask("export", "acme/intents@1", "--out", tmp_path / "out")[0] == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json")
    ]
    code, again = ask("import", tmp_path / "out", "--as", "acme/intents")
    assert (code, again["number"]) == (0, 1), "an export comes back as what it was"


def test_what_was_tampered_with_is_neither_promoted_nor_exported(
    two: list[str], ask: Ask, store: Store, tmp_path: Path
) -> None:
    Path(store.full(f"{adapter_path(two[0])}/.gitattributes")).write_text("")
    code, said = ask("promote", "acme/intents@1", "production")
    assert (code, said["error"]["check"]) == (1, "bytes")
    assert ask("history", "acme/intents")[1][0]["action"] == "adapter.register"
    code, said = ask("export", "acme/intents@1", "--out", tmp_path / "out")
    assert (code, said["error"]["code"]) == (1, "signature_invalid")
    assert not (tmp_path / "out").exists()
    assert ask("diff", "acme/intents@1", "acme/intents@2")[0] == 1
    assert ask("verify", "acme/intents@1")[0] == 1


def test_another_homes_key_is_refused_until_it_is_trusted(
    two: list[str], ask: Ask, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = home / "keys" / "signing.pub"
    monkeypatch.setenv("ADAPTORY_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("ADAPTORY_STORE_URL", str(home / "store"))
    code, report = ask("verify", two[0])
    assert (code, [f["check"] for f in report["findings"] if not f["ok"]]) == (1, ["signature"])
    monkeypatch.setenv("ADAPTORY_TRUSTED_KEYS", str(public))
    assert ask("verify", two[0])[0] == 0
    assert ask("sign", two[0]) == (0, {"adapter": two[0], "signed": True})
    assert ask("sign", two[0]) == (0, {"adapter": two[0], "signed": False})
    monkeypatch.delenv("ADAPTORY_TRUSTED_KEYS")
    assert ask("verify", two[0])[0] == 0


def test_an_unsigned_one_says_what_to_do(
    ask: Ask,
    tell: Callable[..., str],
    store: Store,
    base: BaseModel,
    trained: Callable[..., Path],
    provenance: Callable[..., Provenance],
    tmp_path: Path,
) -> None:
    digest = publish_adapter(store, trained(), base.digest, provenance())
    code, said = ask("export", digest, "--out", tmp_path / "out")
    assert (code, said["error"]["code"]) == (1, "signature_invalid")
    assert f"adaptory adapters sign {digest}" in said["error"]["hint"]
    assert "Signed" in tell("sign", digest)
    assert "already" in tell("sign", digest)
    assert ask("export", digest, "--out", tmp_path / "out")[0] == 0


def test_diff(two: list[str], ask: Ask, tell: Callable[..., str]) -> None:
    code, found = ask("diff", "acme/intents@1", "acme/intents@2")
    assert (code, found["a"], found["b"], found["config"]) == (0, *two, [])
    assert len(found["modules"]) == 4
    assert found["relative"] > 0.5
    text = tell("diff", "acme/intents@1", "acme/intents@2")
    assert "Norms of the updates" in text
    assert found["modules"][0]["module"] in text
    assert "Norms" not in tell("diff", "acme/intents@1", "acme/intents@1")


def test_refusals_for_machines_and_for_people(
    ask: Ask, tell: Callable[..., str], trained: Callable[..., Path], tmp_path: Path
) -> None:
    code, said = ask("import", tmp_path, "--as", "acme/intents")
    assert (code, said["error"]["code"], said["error"]["check"]) == (1, "invalid_adapter", "config")
    for name in ("acme/intents@2", "../../etc/passwd", "acme/../x"):
        code, said = ask("import", trained(), "--as", name)
        assert (code, said["error"]["check"]) == (1, "name")
    for command in ("versions", "history", "show"):
        code, said = ask(command, "acme/nothing@1")
        assert (code, said["error"]["code"]) == (2, "adapter_not_found")
    code, said = ask("promote", "acme/intents", "production")
    assert (code, "names no version" in said["error"]["message"]) == (1, True)
    assert "There are no versions" in tell("versions")
    assert ask("versions") == (0, [])
