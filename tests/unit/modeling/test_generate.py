"""Greedy answers by the plain path are those of transformers. fp32; about 5 seconds."""

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


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2"])
def test_answers_are_those_of_transformers(tiny_model, architecture):
    directory = tiny_model(architecture)
    model = load_model(directory, dtype=torch.float32, plain=True)
    done: list[int] = []
    first = generate(model, [Prompt(p) for p in PROMPTS], max_new_tokens=NEW, end=frozenset({0}), progress=done.append)
    assert first == [theirs(directory, prompt, {0}) for prompt in PROMPTS]
    assert done == [1, 2, 3, 4, 5]
    end = frozenset({first[0][1], first[2][4]})
    cut = generate(model, [Prompt(p) for p in PROMPTS], max_new_tokens=NEW, end=end)
    for whole, short in zip(first, cut, strict=True):
        assert short == whole[: next((n for n, token in enumerate(whole) if token in end), NEW)]
    assert len(cut[0]) < NEW


def test_each_prompt_uses_its_own_adapter(tiny_model):
    model = load_model(tiny_model("llama"), dtype=torch.float32, plain=True)
    for seed, slot in enumerate(("a", "b")):
        add_adapter(model, slot, LoraShape(4 + seed, 8.0), seed)
        for name, parameter in adapter_parameters(model, slot).items():
            if name.endswith("lora_b"):
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    prompts = [Prompt(PROMPTS[1], slot) for slot in (None, "b", "a", None)]
    answers = generate(model, prompts, max_new_tokens=NEW, end=frozenset({0}))
    assert answers[0] == answers[3]
    assert len({tuple(answer) for answer in answers}) == 3
