"""Publishing, listing and naming adapters (2 s)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import AdapterError, ModelError
from orchestrator.modeling.adapter_files import read_adapter
from orchestrator.modeling.base_model import BaseModel, materialize
from orchestrator.registry.adapters import (
    get_adapter,
    list_adapters,
    publish_adapter,
    publish_weights,
    read_provenance,
    resolve_adapter,
)
from orchestrator.registry.provenance import Provenance
from orchestrator.registry.signing import Keys
from orchestrator.registry.verification import sign_published, verify
from orchestrator.store import Store, adapter_path

Trained, Made, Finished = Callable[..., Path], Callable[..., Provenance], Callable[[Provenance, str], None]


def test_published_it_can_be_listed_with_all_that_is_known(
    store: Store, base: BaseModel, trained: Trained, provenance: Made
) -> None:
    digest = publish_adapter(store, trained(), base.digest, provenance(), base=base.path)
    (summary,) = list_adapters(store)
    assert summary == get_adapter(store, digest)
    assert (summary.digest, summary.kind, summary.rank, summary.alpha) == (digest, "lora", 4, 8.0)
    assert (summary.tenant, summary.name, summary.run, summary.step) == ("acme", "intents", "intents-abc234", 40)
    assert (summary.base_digest, summary.targets, summary.dtype) == (base.digest, ["down_proj", "q_proj"], "F32")
    assert summary.evaluation == {"exact_match": 0.75}
    assert summary.parameters == 2 * (4 * (64 + 64) + 4 * (96 + 64))
    assert list_adapters(store, tenant="other") == []

    record = read_provenance(store, digest)
    assert record.data == {"rows.jsonl": "1" * 64, "hf:x": "2" * 64}
    assert (record.git_commit, record.seed, record.dtype) == ("c0ffee", 0, "auto")
    assert record.versions["python"]
    assert record.versions["torch"]
    assert record.hardware["cpus"]
    assert record.hardware["gpus"] == 0
    assert record.spec["spec"]["name"] == "intents"


def test_publishing_equal_weights_again_changes_nothing(
    store: Store, base: BaseModel, trained: Trained, provenance: Made
) -> None:
    first = publish_adapter(store, trained(), base.digest, provenance())
    before = {path: store.read(path) for path in store.list("adapters")}
    assert publish_adapter(store, trained(), base.digest, provenance(run="other-abc234")) == first
    assert {path: store.read(path) for path in store.list("adapters")} == before
    assert publish_adapter(store, trained(1), base.digest, provenance()) != first


def test_what_is_bad_is_not_published(store: Store, base: BaseModel, trained: Trained, provenance: Made) -> None:
    directory = trained()
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))
    with pytest.raises(AdapterError, match="rank 5"):
        publish_adapter(store, directory, base.digest, provenance())
    assert store.list("adapters") == []


def test_one_that_was_never_completed_does_not_exist(
    store: Store, base: BaseModel, trained: Trained, provenance: Made
) -> None:
    digest = publish_adapter(store, trained(), base.digest, provenance())
    store.delete(f"{adapter_path(digest)}/manifest.json")
    assert list_adapters(store) == []
    for ask in (lambda: get_adapter(store, digest), lambda: resolve_adapter(store, digest)):
        with pytest.raises(AdapterError, match="has no adapter"):
            ask()
    assert publish_adapter(store, trained(), base.digest, provenance()) == digest
    assert len(list_adapters(store)) == 1


def test_a_bad_manifest_hides_no_other(
    store: Store, base: BaseModel, trained: Trained, provenance: Made, caplog: pytest.LogCaptureFixture
) -> None:
    good = publish_adapter(store, trained(), base.digest, provenance())
    store.write("adapters/aaaaaaaa/manifest.json", b"{")
    store.write("adapters/bbbbbbbb/manifest.json", b'{"files": {}, "metadata": {"kind": "lora"}}')
    assert [summary.digest for summary in list_adapters(store)] == [good]
    assert "bbbbbbbb" in caplog.text


def test_in_a_bucket(s3: str, base: BaseModel, trained: Trained, provenance: Made, keys: Keys) -> None:
    bucket = Store(s3)
    digest = publish_adapter(bucket, trained(), base.digest, provenance())
    assert resolve_adapter(bucket, digest[7:15]) == digest
    assert sign_published(bucket, digest, keys)
    assert verify(bucket, digest, trust=keys.trust(), base=base.path).ok


def test_the_whole_weights_of_full_tuning(
    store: Store,
    base: BaseModel,
    provenance: Made,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    cache: Path,
    keys: Keys,
) -> None:
    before = (tiny_model("llama") / "config.json").read_bytes()
    digest = publish_weights(store, tiny_model("llama"), provenance())
    assert digest == base.digest  # the same weights, as a base of the next run
    assert get_adapter(store, digest).kind == "full"
    assert sign_published(store, digest, keys)
    assert verify(store, digest, trust=keys.trust()).ok
    store.fetch(adapter_path(digest), tmp_path / "back")
    assert materialize(str(tmp_path / "back"), cache=cache).digest == digest
    assert (tiny_model("llama") / "config.json").read_bytes() == before
    assert not (tiny_model("llama") / "README.md").exists()
    with pytest.raises(ModelError):
        publish_weights(store, tmp_path, provenance())


# --- references -----------------------------------------------------------------------------------------------------


def test_every_way_to_name_it(
    store: Store, base: BaseModel, trained: Trained, provenance: Made, finished: Finished
) -> None:
    digest = publish_adapter(store, trained(), base.digest, provenance())
    finished(provenance(), digest)
    for reference in (digest, digest[7:], digest[7:13], digest[:15], "intents", "intents-abc234", "acme/intents"):
        assert resolve_adapter(store, reference) == digest
    assert resolve_adapter(store, "intents", tenant="acme") == digest


def test_equal_weights_of_two_runs_are_found_by_both(
    store: Store, base: BaseModel, trained: Trained, provenance: Made, finished: Finished
) -> None:
    again = provenance(run="again-bcd234", name="again")
    for made in (provenance(), again):
        finished(made, publish_adapter(store, trained(), base.digest, made))
    assert resolve_adapter(store, "intents") == resolve_adapter(store, "again")


def test_a_name_means_the_newest_and_two_tenants_are_asked_apart(
    store: Store, base: BaseModel, trained: Trained, provenance: Made, finished: Finished
) -> None:
    made = [provenance(), provenance(run="intents-zzz234"), provenance(run="intents-yyy234", tenant="umbrella")]
    digests = [publish_adapter(store, trained(seed), base.digest, one) for seed, one in enumerate(made)]
    for one, digest in zip(made[:2], digests, strict=False):
        finished(one, digest)
    assert resolve_adapter(store, "intents") == digests[1]
    finished(made[2], digests[2])
    with pytest.raises(AdapterError, match="names 2 adapters: acme/intents, umbrella/intents"):
        resolve_adapter(store, "intents")
    assert resolve_adapter(store, "umbrella/intents") == digests[2]
    assert resolve_adapter(store, "intents", tenant="acme") == digests[1]


def test_what_names_nothing_says_what_is_near(
    store: Store, base: BaseModel, trained: Trained, provenance: Made, finished: Finished
) -> None:
    with pytest.raises(AdapterError, match="Nothing has been published yet"):
        resolve_adapter(store, "intents")
    finished(provenance(), publish_adapter(store, trained(), base.digest, provenance()))
    with pytest.raises(AdapterError, match="Did you mean intents"):
        resolve_adapter(store, "intent")
    for reference in ("sha256:000000000000", "../../etc/passwd", "", "abc", "intents-abc23"):
        with pytest.raises(AdapterError, match="has no adapter"):
            resolve_adapter(store, reference)


def test_a_prefix_of_two_is_ambiguous(store: Store) -> None:
    for rest in ("1", "2"):
        store.write(f"adapters/abcdef{rest}/manifest.json", b'{"files": {}}')
    with pytest.raises(AdapterError, match="names 2 adapters: abcdef1, abcdef2"):
        resolve_adapter(store, "abcdef")


def test_it_loads_as_it_was_written(
    store: Store, base: BaseModel, trained: Trained, provenance: Made, tmp_path: Path
) -> None:
    digest = publish_adapter(store, trained(), base.digest, provenance())
    store.fetch(adapter_path(digest), tmp_path / "back")
    (config, tensors), (expected, theirs) = read_adapter(tmp_path / "back"), read_adapter(trained())
    assert config == expected
    assert all(tensors[name].equal(theirs[name]) for name in theirs)
    card = (tmp_path / "back" / "README.md").read_text()
    assert digest in card
    assert "library_name: peft" in card
