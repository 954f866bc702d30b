"""What is admitted of adapters that were trained elsewhere, and what is refused without a trace (6 s)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from orchestrator.commands.serving import trained_bases
from orchestrator.db import Database
from orchestrator.errors import AdapterError, ModelError
from orchestrator.modeling.base_model import BaseModel, publish_base
from orchestrator.names import AdapterReference
from orchestrator.registry import importing
from orchestrator.registry.adapters import get_adapter, publish_adapter, read_provenance
from orchestrator.registry.importing import import_adapter
from orchestrator.registry.provenance import Provenance
from orchestrator.registry.resolving import resolve_references
from orchestrator.registry.signing import Keys
from orchestrator.registry.verification import verify
from orchestrator.registry.versions import AdapterVersion, list_versions, parse_reference
from orchestrator.runs.repository import list_adapters
from orchestrator.store import Store

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Trained, Take = Callable[..., Path], Callable[..., AdapterVersion]


@pytest.fixture
def take(db: Database, store: Store, keys: Keys, cache: Path) -> Take:
    def run(directory: Path, name: str = "acme/intents", **options: Any) -> AdapterVersion:
        options = {"max_rank": 64} | options
        return import_adapter(
            db, store, directory, parse_reference(name, "default"), keys=keys, actor="ada", cache=cache, **options
        )

    return run


def restate(directory: Path, **changes: Any) -> Path:
    file = directory / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def change(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load((directory / WEIGHTS).read_bytes())
    change(tensors)
    (directory / WEIGHTS).write_bytes(save(tensors))
    return directory


def test_imported_it_is_signed_and_a_version(
    take: Take, trained: Trained, base: BaseModel, store: Store, keys: Keys, tmp_path: Path
) -> None:
    version = take(trained(), base=base.reference)
    assert (version.reference, version.run_id, version.created_by) == ("acme/intents@1", None, "ada")
    assert verify(store, version.digest, trust=keys.trust(), base=base.path).ok
    summary, provenance = get_adapter(store, version.digest), read_provenance(store, version.digest)
    assert (summary.tenant, summary.name, summary.run, summary.rank) == ("acme", "intents", None, 4)
    assert provenance.base_model.digest == base.digest
    assert provenance.imported is not None
    assert provenance.imported.source == str(tmp_path / "trained-0")
    assert "Trained elsewhere" in store.read(f"adapters/{version.digest[7:]}/README.md").decode()


def test_imported_it_can_be_served(take: Take, trained: Trained, base: BaseModel, db: Database) -> None:
    """Under each of its names; `adaptory up` serves its base, if it is known where that is."""
    take(trained(), base=base.reference)
    take(trained(), "acme/again", base=base.reference)
    lost = take(restate(trained(1), base_model_name_or_path=None), "globex/lost", base_digest=base.digest)
    references = [AdapterReference.parse(each) for each in ("acme/intents@1", "acme/again@1", "globex/lost@1")]
    assert {found.base_digest for found in resolve_references(db, references).values()} == {base.digest}
    records = {record.tenant: record for record in list_adapters(db)}
    assert len(records) == 2
    assert (records["globex"].digest, records["globex"].run_id, records["globex"].rank) == (lost.digest, None, 4)
    assert trained_bases(db) == [base.reference]


def test_the_same_again_is_the_same_version_and_other_weights_are_the_next(
    take: Take, trained: Trained, base: BaseModel, store: Store
) -> None:
    first = take(trained())
    kept = {path: store.read(path) for path in store.list("adapters")}
    assert take(trained()) == first
    assert {path: store.read(path) for path in store.list("adapters")} == kept
    assert take(trained(1)).number == 2
    assert take(trained(), name="umbrella/other").digest == first.digest


def test_what_peft_itself_wrote(take: Take, base: BaseModel, store: Store, keys: Keys, tmp_path: Path) -> None:
    """With everything that PEFT puts into its configuration, and the files a trainer leaves beside it."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "peft")
    (tmp_path / "peft" / "optimizer.pt").write_bytes(b"a pickle")
    version = take(tmp_path / "peft")
    assert verify(store, version.digest, trust=keys.trust(), base=base.path).ok
    assert not [path for path in store.list("adapters") if path.endswith(".pt")]


def test_one_that_a_job_has_published_is_signed_and_keeps_its_provenance(
    take: Take, trained: Trained, base: BaseModel, store: Store, keys: Keys, provenance: Callable[..., Provenance]
) -> None:
    digest = publish_adapter(store, trained(), base.digest, provenance())
    assert take(trained(), name="acme/other").digest == digest
    assert verify(store, digest, trust=keys.trust(), base=base.path).ok
    assert read_provenance(store, digest).run == "intents-abc234"


def test_a_base_that_is_known_by_its_digest_only(
    take: Take, trained: Trained, base: BaseModel, store: Store, cache: Path
) -> None:
    said: list[str] = []
    assert take(trained(), base_digest=base.digest, say=said.append).number == 1
    assert said == [], "it is on this machine"
    with pytest.raises(AdapterError, match="the base has no linear") as caught:
        take(
            change(
                trained(1), lambda t: t.update({k.replace("q_proj", "x"): t.pop(k) for k in list(t) if "q_proj" in k})
            )
        )
    assert caught.value.context["check"] == "names"
    shutil.rmtree(cache)
    publish_base(store, base)
    assert take(trained(2), base_digest=base.digest, say=said.append).number == 2
    away = "sha256:" + "7" * 64
    version = take(trained(3), base_digest=away, say=said.append)
    assert "is not here" in said[-1]
    assert get_adapter(store, version.digest).base_digest == away


# --- refused --------------------------------------------------------------------------------------------------------


def pickled(directory: Path) -> Path:
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    return directory


REFUSED: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "a pickle": ("weights", "is a pickle", pickled),
    "cut off": ("weights", "is damaged", lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9])),
    "no weights": ("weights", "has no adapter_model.safetensors", lambda d: (d / WEIGHTS).unlink()),
    "no configuration": ("config", "cannot be read", lambda d: (d / CONFIG).unlink()),
    "more than LoRA": ("config", "use_dora", lambda d: restate(d, use_dora=True)),
    "another method": ("config", "is IA3", lambda d: restate(d, peft_type="IA3")),
    "too large a rank": ("rank", "rank 65; 1 to 64", lambda d: restate(d, r=65)),
    "one module's rank": ("rank", "rank 999", lambda d: restate(d, rank_pattern={"q_proj": 999})),
    "no rank": ("rank", "rank 0", lambda d: restate(d, r=0)),
    "a rank it does not have": ("shape", "the configuration says rank 8", lambda d: restate(d, r=8)),
    "targets without tensors": ("names", "names k_proj", lambda d: restate(d, target_modules=["q_proj", "down_proj", "k_proj"])),
    "tensors that no target covers": ("names", "is not among target_modules", lambda d: restate(d, target_modules=["q_proj"])),
    "a foreign tensor": ("names", "no tensor of a plain LoRA", lambda d: change(d, lambda t: t.update(x=torch.ones(2)))),
    "no effect": ("effect", "changes nothing", lambda d: change(d, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])),
    "not finite": ("finite", "NaN or infinite", lambda d: change(d, lambda t: t[min(t)].fill_(float("inf")))),
    "no base named": ("base", "names no base model", lambda d: restate(d, base_model_name_or_path=None)),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_without_a_trace(
    what: str, take: Take, trained: Trained, store: Store, db: Database, tmp_path: Path
) -> None:
    check, words, spoil = REFUSED[what]
    spoil(trained())
    with pytest.raises(AdapterError, match=words) as caught:
        take(tmp_path / "trained-0")
    assert caught.value.context["check"] == check
    assert caught.value.hint
    assert store.list("") == []
    assert list_versions(db) == []


def test_another_base_is_refused(
    take: Take, trained: Trained, store: Store, base: BaseModel, tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(AdapterError, match=r"in the adapter and .* in the base") as caught:
        take(trained(), base=str(tiny_model("gemma2")))
    assert caught.value.context["check"] in ("names", "shape")
    with pytest.raises(AdapterError, match=r"has digest .*, not sha256:0000") as caught:
        take(trained(), base=base.reference, base_digest="sha256:" + "0" * 64)
    assert caught.value.context["check"] == "base"
    with pytest.raises(ModelError):
        take(trained(), base="/nowhere/model")
    assert store.list("") == []


def test_a_version_is_not_chosen(take: Take, trained: Trained, store: Store) -> None:
    with pytest.raises(AdapterError, match="gets the next version of acme/intents") as caught:
        take(trained(), name="acme/intents@7")
    assert caught.value.context["check"] == "name"
    assert store.list("") == []


class Killed(BaseException):
    pass


def test_killed_at_any_step_it_is_repeated_to_the_same_end(
    take: Take, trained: Trained, store: Store, db: Database, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the manifest readers see nothing; after it, the adapter is whole and signed, whether registered or not."""
    whole = store.write

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", killed)  # the manifest is the only thing that is written so
        with pytest.raises(Killed):
            take(trained())
    assert store.write == whole
    assert [name for name in store.children("adapters") if store.manifest(f"adapters/{name}")] == []
    with monkeypatch.context() as patch:
        patch.setattr(importing.versions, "register", killed)
        with pytest.raises(Killed):
            take(trained())
    (name,) = store.children("adapters")
    assert verify(store, f"sha256:{name}", trust=keys.trust()).ok
    assert list_versions(db) == []
    assert take(trained()).digest == f"sha256:{name}"
    assert [version.number for version in list_versions(db)] == [1]
