"""Greedy answers of a mixed batch are those of each prompt alone, and of transformers. fp32; about 10 seconds."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.modeling.decoder import adapter_parameters, add_adapter
from orchestrator.modeling.generate import Prompt, generate
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.lora import LoraShape

PROMPTS = [list(range(5, 5 + n)) for n in (3, 11, 7, 1, 9)]
NEW = 12


def theirs(directory, prompt, end):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=sorted(end),
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    stop = next((n for n, token in enumerate(out) if token in end), len(out))
    return out[:stop]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_answers_are_those_of_transformers(tiny_model, architecture, plain):
    directory = tiny_model(architecture)
    model = load_model(directory, dtype=torch.float32, plain=plain)
    first = generate(model, [Prompt(p) for p in PROMPTS], max_new_tokens=NEW, end=frozenset({0}))
    assert first == [theirs(directory, prompt, {0}) for prompt in PROMPTS]


def test_prompts_end_at_different_times_and_batches_split(tiny_model):
    """An end token that some answers reach early: the cache is rewritten, and what is left goes on unharmed."""
    directory = tiny_model("llama")
    model = load_model(directory, dtype=torch.float32)
    free = generate(model, [Prompt(p) for p in PROMPTS], max_new_tokens=NEW, end=frozenset({0}))
    end = frozenset({free[0][1], free[2][4], free[4][7]})
    done: list[int] = []
    cut = generate(model, [Prompt(p) for p in PROMPTS], max_new_tokens=NEW, end=end, batch_size=4, progress=done.append)
    for whole, short in zip(free, cut, strict=True):
        stop = next((n for n, token in enumerate(whole) if token in end), NEW)
        assert short == whole[:stop]
    assert len({len(answer) for answer in cut}) > 1
    assert done == [4, 5]


def test_each_prompt_uses_its_own_adapter(tiny_model):
    model = load_model(tiny_model("llama"), dtype=torch.float32)
    for seed, slot in enumerate(("a", "b")):
        add_adapter(model, slot, LoraShape(4 + seed, 8.0), seed)
        for name, parameter in adapter_parameters(model, slot).items():
            if name.endswith("lora_b"):
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    prompts = [Prompt(p, slot) for p in PROMPTS[:3] for slot in (None, "b", "a")]
    mixed = generate(model, prompts, max_new_tokens=NEW, end=frozenset({0}))
    alone = [generate(model, [prompt], max_new_tokens=NEW, end=frozenset({0}))[0] for prompt in prompts]
    assert mixed == alone
    assert len({tuple(answer) for answer in mixed[:3]}) == 3
