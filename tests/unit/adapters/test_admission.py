"""Each way in which an adapter is not what it must be, through a real store and the disk tier. About 10 seconds."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.errors import AdapterError, StoreError
from orchestrator.modeling.adapter_files import adapter_digest
from orchestrator.store import MANIFEST, adapter_path, sha256_file
from serving.adapters.admission import CHECKS, check_digest, check_name
from serving.adapters.loader import Loader

WEIGHTS = "adapter_model.safetensors"
HIT = []


class Payload:
    """What a pickle could do to whoever loads it."""

    def __reduce__(self):
        return HIT.append, ("ran",)


def restate(directory: Path) -> None:
    """Make the manifest fit the files again, as somebody would who wants a change to go unseen."""
    file = directory / MANIFEST
    manifest = json.loads(file.read_text())
    for name, entry in manifest["files"].items():
        entry.update(size=(directory / name).stat().st_size, sha256=sha256_file(directory / name))
    file.write_text(json.dumps(manifest))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x10
    file.write_bytes(data)


@pytest.fixture
def loader(settings):
    return Loader(settings)


@pytest.fixture
def shelf(store):
    """Where an adapter lies in the store."""
    return lambda digest: Path(store.full(adapter_path(digest)))


def refusal(loader, digest):
    """The check that refuses it; the disk keeps nothing of it."""
    with pytest.raises(AdapterError) as caught:
        loader.load(digest)
    assert caught.value.context["adapter"] == digest[:100]
    assert not [p for p in loader.disk.root.iterdir() if p.is_dir()]
    assert str(loader.disk.root) not in str(caught.value)
    assert caught.value.context["check"] in CHECKS
    return caught.value.context["check"]


def test_a_good_one_is_the_networks_own_reading_of_its_files(loader, write, publish, served):
    directory = write()
    prepared, from_store = loader.load(publish(directory))
    assert from_store
    expected, found = served.read(directory), prepared.updates(served.device)
    assert expected.keys() == found.keys()
    for name, updates in expected.items():
        for mine, theirs in zip(updates, found[name], strict=True):
            assert mine.projection == theirs.projection
            assert torch.equal(mine.a, theirs.a)
            assert torch.equal(mine.b, theirs.b)


def test_the_second_time_it_comes_from_the_disk_and_needs_no_store(loader, write, publish, store):
    digest = publish(write())
    loader.load(digest)
    store.delete(adapter_path(digest))
    _, from_store = loader.load(digest)
    assert not from_store


@pytest.mark.parametrize(
    "name", ["", "sha256:", "sha256:" + "A" * 64, "a" * 64, "sha256:../../etc", "sha256:" + "a" * 64 + "/..", "../x"]
)
def test_only_a_digest_names_an_adapter(name):
    with pytest.raises(AdapterError) as caught:
        check_digest(name)
    assert caught.value.context["check"] == "digest"


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "a/../../x",
        "/etc/x",
        "a//b",
        "./a",
        "a/.",
        ".hidden",
        "a/.git/x",
        "a\\..\\b",
        "",
        "a\0b",
        "a\nb",
        "x" * 256,
    ],
)
def test_a_files_name_stays_inside(name):
    with pytest.raises(AdapterError) as caught:
        check_name(name, "sha256:a")
    assert caught.value.context["check"] == "contained"


def test_unknown_or_half_published(loader, write, publish, shelf):
    assert refusal(loader, "sha256:" + "0" * 64) == "published"
    digest = publish(write())
    (shelf(digest) / MANIFEST).unlink()
    assert refusal(loader, digest) == "published"


def test_flipped_bits(loader, write, publish, shelf):
    digest = publish(write())
    flip(shelf(digest) / WEIGHTS)
    assert refusal(loader, digest) == "bytes"
    with pytest.raises(AdapterError, match=f"was changed: {WEIGHTS} has digest") as caught:
        loader.load(digest)
    assert loader.settings.store_url not in str(caught.value), "where the store is concerns no client"
    restate(shelf(digest))
    assert refusal(loader, digest) == "digest"


def test_a_changed_scale_is_another_adapter(loader, write, publish, shelf, configured):
    digest = publish(write())
    configured(shelf(digest), lora_alpha=64)
    restate(shelf(digest))
    assert refusal(loader, digest) == "digest"


def test_cut_short(loader, write, publish, shelf):
    digest = publish(write())
    file = shelf(digest) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    restate(shelf(digest))
    assert refusal(loader, digest) == "weights"


@pytest.mark.parametrize("name", ["adapter_model.bin", "extra/training_args.PT", "setup.py"])
def test_a_pickle_is_refused_and_never_opened(loader, write, publish, name):
    directory = write()
    digest = adapter_digest(directory, loader.settings.requirements.base_digest)
    if name == "adapter_model.bin":
        (directory / WEIGHTS).unlink()
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(pickle.dumps(Payload()))
    publish(directory, digest=digest)
    assert refusal(loader, digest) == "weights"
    assert HIT == []


def test_a_pickle_that_calls_itself_safetensors(loader, write, publish):
    directory = write()
    digest = adapter_digest(directory, loader.settings.requirements.base_digest)
    (directory / WEIGHTS).write_bytes(pickle.dumps(Payload()))
    publish(directory, digest=digest)
    assert refusal(loader, digest) == "weights"
    assert HIT == []


def test_whole_weights_are_no_adapter(loader, write, publish):
    assert refusal(loader, publish(write(), kind="full")) == "kind"


@pytest.mark.parametrize("says", ["the manifest", "provenance", "nothing"])
def test_of_another_base(loader, write, publish, says, monkeypatch):
    other, directory = "sha256:" + "c" * 64, write()
    if says == "provenance":
        monkeypatch.setattr("serving.adapters.admission._said_base", lambda _: other)
    digest = publish(directory, base=other, **({"base_digest": other} if says == "the manifest" else {}))
    assert refusal(loader, digest) == ("digest" if says == "nothing" else "base")


def test_a_lie_about_the_base_is_no_help(loader, write, publish):
    digest = publish(write(), base="sha256:" + "c" * 64, base_digest=loader.settings.requirements.base_digest)
    assert refusal(loader, digest) == "digest"


def test_over_the_rank(loader, write, publish):
    assert refusal(loader, publish(write(1, rank=17), rank=17)) == "rank"
    assert refusal(loader, publish(write(1, rank=17), rank=4)) == "rank", "the manifest's word admits nothing"
    assert refusal(loader, publish(write(2, rank_pattern={"q_proj": 32}))) == "rank"
    loader.load(publish(write(3, rank=16)))


def test_too_large(settings, write, publish, shelf):
    digest = publish(write())
    size = sum(file.stat().st_size for file in shelf(digest).iterdir())
    small = Loader(replace(settings, requirements=replace(settings.requirements, max_bytes=size // 2)))
    assert refusal(small, digest) == "size"


def _other_module(tensors, _):
    for name in [n for n in tensors if "layers.0.self_attn.q_proj" in n]:
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def _nan(tensors, _):
    tensors[min(tensors)][0, 0] = float("nan")


def _nothing(tensors, _):
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def _half(tensors, _):
    del tensors[min(tensors)]


def _wide(tensors, _):
    name = min(tensors)
    tensors[name] = torch.ones(4, tensors[name].shape[1] + 1)


def _no_down(tensors, _):
    for name in [n for n in tensors if "down_proj" in n]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "check"),
    [(_other_module, "names"), (_half, "names"), (_no_down, "names"), (_wide, "shape"), (_nan, "finite"), (_nothing, "effect")],
)  # fmt: skip
def test_tensors_that_do_not_fit(loader, write, publish, change, check):
    assert refusal(loader, publish(write(change=change))) == check


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"r": "x"},
        {"rank_pattern": {"q_proj": "x"}},
        {"rank_pattern": {"(a+)+$": 4}},
        {"rank_pattern": {"(((a|a)|(a|a))|a)": 4}},
        {"rank_pattern": {f"m{n}": 4 for n in range(300)}},
        {"target_modules": r"(?=.*)(.*)(.*)(.*)q_proj"},
        {"target_modules": "(unbalanced"},
        {"lora_alpha": "NaN" * 1000},
        {"task_type": "x" * (1 << 20)},
    ],
    ids=lambda config: f"{config!s:.40}",
)
def test_a_configuration_that_makes_no_sense_or_stalls(loader, write, publish, configured, config):
    directory = configured(write(), **config)
    try:
        digest = adapter_digest(directory, loader.settings.requirements.base_digest)
    except AdapterError:
        digest = "sha256:" + "1" * 64
    publish(directory, digest=digest)
    start = time.monotonic()
    assert refusal(loader, digest) == "config"
    assert time.monotonic() - start < 10, "a hostile pattern takes hours"


def test_a_deeply_nested_configuration(loader, write, publish):
    directory = write()
    digest = adapter_digest(directory, loader.settings.requirements.base_digest)
    (directory / "adapter_config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    publish(directory, digest=digest)
    assert refusal(loader, digest) == "config"


@pytest.mark.parametrize(
    "targets", [r".*\.(q_proj|down_proj)", r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|down_proj)"]
)
def test_peft_s_usual_patterns_are_served(loader, write, publish, targets):
    loader.load(publish(write(target_modules=targets)))


def test_a_manifest_that_names_files_elsewhere(loader, write, publish, shelf):
    digest = publish(write())
    file = shelf(digest) / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["files"]["../../../secret.json"] = {"size": 1, "sha256": "0" * 64}
    file.write_text(json.dumps(manifest))
    assert refusal(loader, digest) == "contained"


@pytest.mark.parametrize("what", ["a file", "the directory"])
def test_a_link_out_of_the_store(loader, write, publish, shelf, tmp_path, what):
    digest = publish(write())
    directory, outside = shelf(digest), tmp_path / "outside"
    linked = directory / WEIGHTS if what == "a file" else directory
    linked.rename(outside)
    linked.symlink_to(outside)
    assert refusal(loader, digest) == "contained"


def test_a_copy_that_was_damaged_on_this_disk_is_fetched_again(loader, write, publish):
    digest = publish(write())
    good, _ = loader.load(digest)
    flip(loader.disk.root / digest.removeprefix("sha256:") / WEIGHTS)
    again, from_store = loader.load(digest)
    assert from_store
    assert torch.equal(again.buffer, good.buffer)
    assert loader.disk.metrics.fetches == 2


def test_a_store_that_is_gone_for_a_while(loader, write, publish, store):
    here, there = publish(write(1)), publish(write(2))
    loader.load(here)
    root = Path(store.root)
    root.rename(root.with_name("gone"))
    root.write_text("where the store was mounted")
    loader.load(here)
    with pytest.raises(StoreError, match="cannot be used"):
        loader.load(there)
    root.unlink()
    root.with_name("gone").rename(root)
    loader.load(there)


def test_the_signature_is_asked_for_on_every_load(settings, write, publish):
    asked = []

    def signature(directory, digest):
        asked.append(digest)
        if len(asked) > 2:
            raise AdapterError("Unsigned.", adapter=digest, check="signature")

    loader = Loader(replace(settings, requirements=replace(settings.requirements, signature=signature)))
    digest = publish(write())
    loader.load(digest)
    loader.load(digest)
    assert asked == [digest] * 2
    assert refusal(loader, digest) == "signature"
