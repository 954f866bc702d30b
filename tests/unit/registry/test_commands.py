"""`adaptory adapters …` over a real store (6 s, most of it importing PEFT and transformers)."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from orchestrator.cli import main
from orchestrator.modeling.base_model import BaseModel, publish_base
from orchestrator.registry.adapters import publish_adapter
from orchestrator.registry.provenance import Provenance
from orchestrator.registry.signing import Keys
from orchestrator.store import Store, adapter_path

IDS = torch.arange(20)[None] + 5


@pytest.fixture
def digest(
    store: Store,
    base: BaseModel,
    trained: Callable[..., Path],
    provenance: Callable[..., Provenance],
    finished: Callable[[Provenance, str], None],
    keys: Keys,
) -> str:
    made = provenance()
    digest = publish_adapter(store, trained(), base.digest, made, keys=keys)
    finished(made, digest)
    return digest


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command with --json; returns its exit code and what it printed."""

    def run(*args: str) -> tuple[int, Any]:
        code = main(["adapters", *args, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_list_and_show(digest: str, ask: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = ask("list")
    assert (code, [one["digest"] for one in found]) == (0, [digest])
    assert ask("list", "--tenant", "other") == (0, [])
    code, shown = ask("show", "intents")
    assert (code, shown["digest"], shown["provenance"]["step"]) == (0, digest, 40)

    assert main(["adapters", "list"]) == 0
    assert main(["adapters", "show", digest[7:15]]) == 0
    text = capsys.readouterr().out
    for words in (
        digest,
        digest[7:19],
        "acme/intents",
        "LoRA rank 4, alpha 8",
        "exact_match 0.75",
        "rows.jsonl  sha256:1111",
    ):
        assert words in text


def test_an_empty_store(ask: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("list") == (0, [])
    assert main(["adapters", "list"]) == 0
    assert "adaptory run" in capsys.readouterr().err
    code, said = ask("show", "nothing")
    assert (code, said["error"]["code"]) == (2, "adapter_not_found")


def test_a_narrow_terminal_still_tells_which_is_which(
    digest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.commands.adapters.console", lambda: Console(width=60))
    assert main(["adapters", "list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert max(map(len, rows)) <= 60
    [row] = [row for row in rows if digest[7:19] in row]
    assert "acme/intents" in row


def test_verify(digest: str, store: Store, ask: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, report = ask("verify", "intents")
    assert (code, report["ok"]) == (0, True)
    assert [finding["check"] for finding in report["findings"]][:2] == ["bytes", "signature"]
    assert {"check": "shapes", "ok": True, "detail": "against the base"} in report["findings"]

    weights = Path(store.full(f"{adapter_path(digest)}/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    code, report = ask("verify", "intents")
    assert (code, report["ok"]) == (1, False)
    assert main(["adapters", "verify", "intents"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "is not what was published" in printed.err


@torch.no_grad()
def test_exported_both_ways_it_gives_the_same_logits(
    digest: str, base: BaseModel, ask: Callable[..., Any], tmp_path: Path
) -> None:
    """PEFT finds the base by itself from what the export wrote into the configuration."""
    import peft
    from transformers import AutoModelForCausalLM

    code, _ = ask("export", "intents", "--out", str(tmp_path / "peft"))
    assert code == 0
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")(IDS).logits
    code, _ = ask("export", "intents", "--out", str(tmp_path / "full"), "--merged", "--dtype", "float32")
    assert code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(base.path)(IDS).logits
    assert (adapted - plain).abs().max() > 0.05
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "full" / "provenance.json").is_file()
    assert not list(tmp_path.glob(".tmp-*"))


def test_export_into_something_that_is_there(digest: str, ask: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    for extra in ([], ["--merged"]):
        code, said = ask("export", "intents", "--out", str(tmp_path / "out"), *extra)
        assert (code, said["error"]["code"]) == (2, "usage")
        assert "not an empty directory" in said["error"]["message"]
    code, said = ask("export", "intents", "--out", str(tmp_path / "other"), "--dtype", "float32")
    assert (code, said["error"]["hint"]) == (2, "Add --merged, or leave --dtype out.")


@pytest.mark.parametrize("extra", [[], ["--merged"]])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_export_to_a_place_that_takes_nothing(
    digest: str, ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, extra: list[str]
) -> None:
    """The disk's own answers, as `shutil.copyfile` gives them; nothing is left of what was begun."""

    def refused(source: Any, target: Any, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr("fsspec.implementations.local.shutil.copyfile", refused)
    code, said = ask("export", "intents", "--out", str(tmp_path / "new" / "deep" / "out"), *extra)
    assert (code, said["error"]["code"]) == (1, "output_unwritable")
    assert f"out cannot be written: {os.strerror(number)}" in said["error"]["message"]
    assert said["error"]["message"].startswith("--out ")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("extra", [[], ["--merged"]])
def test_export_where_no_directory_can_be(digest: str, ask: Callable[..., Any], extra: list[str]) -> None:
    code, said = ask("export", "intents", "--out", "/proc/nowhere/out", *extra)
    assert code == 1
    assert said["error"]["message"].startswith("--out /proc/nowhere/out cannot be written: ")


def test_export_when_the_base_is_gone_or_another(
    store: Store,
    base: BaseModel,
    trained: Callable[..., Path],
    provenance: Callable[..., Provenance],
    ask: Callable[..., Any],
    cache: Path,
    keys: Keys,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = provenance()
    other = made.base_model.model_copy(update={"digest": "sha256:" + "0" * 64})
    digest = publish_adapter(store, trained(), other.digest, made.model_copy(update={"base_model": other}), keys=keys)
    code, said = ask("export", digest, "--out", str(tmp_path / "a"), "--merged")
    assert (code, said["error"]["check"]) == (1, "base")

    gone = made.base_model.model_copy(update={"reference": "/nowhere/model"})
    digest = publish_adapter(store, trained(1), base.digest, made.model_copy(update={"base_model": gone}), keys=keys)
    # Its name leads nowhere, but a base of this digest was used on this machine before.
    assert ask("export", digest, "--out", str(tmp_path / "b"), "--merged")[0] == 0
    shutil.rmtree(cache)
    code, said = ask("export", digest, "--out", str(tmp_path / "c"), "--merged")
    assert (code, said["error"]["code"]) == (2, "invalid_model")
    assert main(["adapters", "export", digest, "--out", str(tmp_path / "d")]) == 0
    assert "the base model is not here" in capsys.readouterr().err
    assert (tmp_path / "d" / "adapter_model.safetensors").is_file()

    publish_base(store, base)  # the store's own copy is found by its digest
    assert ask("export", digest, "--out", str(tmp_path / "e"), "--merged")[0] == 0


def test_export_keeps_the_hubs_name_of_the_base(
    store: Store,
    base: BaseModel,
    trained: Callable[..., Path],
    provenance: Callable[..., Provenance],
    ask: Callable[..., Any],
    keys: Keys,
    tmp_path: Path,
) -> None:
    made = provenance()
    record = made.base_model.model_copy(update={"loadable_name": "acme/tiny", "reference": "acme/tiny"})
    digest = publish_adapter(store, trained(), base.digest, made.model_copy(update={"base_model": record}), keys=keys)
    assert ask("export", digest, "--out", str(tmp_path / "out"))[0] == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"
