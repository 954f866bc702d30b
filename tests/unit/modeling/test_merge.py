"""Merged weights against PEFT's own merge, for each layout of a base (5 s)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import AdapterError
from orchestrator.modeling.adapter_check import base_modules
from orchestrator.modeling.adapter_files import AdapterConfig, write_adapter
from orchestrator.modeling.merge import merge

IDS = torch.arange(24)[None] + 5


def write_random(base: Path, directory: Path, targets: tuple[str, ...], **extra: Any) -> Path:
    config = AdapterConfig(4, 8.0, targets, **extra)
    generator, tensors = torch.Generator().manual_seed(2), {}
    for module, (out, width) in sorted(base_modules(base).items()):
        if module.rpartition(".")[2] in targets:
            rank = config.rank_of(module)
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    write_adapter(directory, config, tensors)
    return directory


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("architecture", "targets", "extra"),
    [
        ("llama", ("q_proj", "down_proj"), {}),
        ("llama-untied", ("o_proj", "lm_head"), {"rslora": True}),
        ("qwen2", ("k_proj", "gate_proj"), {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"gate_proj": 3.5}}),
        ("gemma2", ("v_proj", "up_proj"), {"rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 7}}),
        ("gpt2", ("c_attn", "c_proj"), {"fan_in_fan_out": True}),
    ],
)
def test_plain_transformers_loads_what_peft_would_have_merged(
    architecture: str,
    targets: tuple[str, ...],
    extra: dict[str, Any],
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
) -> None:
    import peft
    from transformers import AutoTokenizer

    base = tiny_model(architecture)
    adapter = write_random(base, tmp_path / "adapter", targets, **extra)
    theirs = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    ours = load(merge(base, adapter, tmp_path / "merged"))
    assert (logits(ours) - logits(load(base))).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_a_tied_head_gets_its_own_weights_and_the_embedding_keeps_its(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """PEFT's in-place merge would change the shared embedding as well; the adapter never saw that."""
    import peft

    base = tiny_model("llama")
    adapter = write_random(base, tmp_path / "adapter", ("lm_head", "q_proj"))
    merged = load(merge(base, adapter, tmp_path / "merged"))
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.get_input_embeddings().weight, load(base).get_input_embeddings().weight)
    unmerged = peft.PeftModel.from_pretrained(load(base), adapter)
    torch.testing.assert_close(logits(merged), logits(unmerged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("lm_head",)])
def test_several_weight_files(targets: tuple[str, ...], tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    base, whole = tmp_path / "sharded", tiny_model("llama")
    load(whole).save_pretrained(base, max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = write_random(base, tmp_path / "adapter", targets)
    merged = load(merge(base, adapter, tmp_path / "merged"))
    expected = load(merge(whole, adapter, tmp_path / "one"))
    assert torch.equal(logits(merged), logits(expected))


def test_dtype_is_written_and_said(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file

    adapter = write_random(tiny_model("llama"), tmp_path / "adapter", ("q_proj",))
    out = merge(tiny_model("llama"), adapter, tmp_path / "merged", dtype="bfloat16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    base = tiny_model("llama")
    adapter = write_random(base, tmp_path / "adapter", ("q_proj",))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(AdapterError, match="not an empty directory"):
        merge(base, adapter, full)
    with pytest.raises(AdapterError, match="cannot be used"):
        merge(tiny_model("gemma2"), adapter, tmp_path / "merged")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "full"}
    assert [p.name for p in full.iterdir()] == ["mine.txt"]

    (tmp_path / "empty").mkdir()
    merge(base, adapter, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
