"""Answers for evaluation: by the engine those of stock PEFT, and by the plain path as well. fp32; about 10 seconds."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.data import TestRow
from jobs.data.render import Renderer
from jobs.evaluate import BASE, Candidate, answer
from jobs.train.publish import load_adapter
from orchestrator.modeling.loading import load_model

NEW = 16


@pytest.fixture
def rows(entities_rows):
    return [TestRow(row["messages"][:-1], None, row["messages"][-1]["content"]) for row in entities_rows[:5]]


def write_adapter(base, directory):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(directory)
    return directory


def stock_answers(base, adapter, tokenizer, rows):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    texts = []
    for row in rows:
        prompt = Renderer(tokenizer).prompt(row.messages, row.tools)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def without_torn_end(text):
    """The engine drops the bytes of a character that the last token leaves unfinished."""
    return text.rstrip("\ufffd")


@pytest.mark.parametrize("plain", [False, True])
def test_base_and_adapter_answer_as_stock_peft_does(tiny_model, rows, tmp_path, plain):
    base = tiny_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapter = write_adapter(base, tmp_path / "adapter")
    model = load_model(base, dtype=torch.float32, plain=plain).eval()
    load_adapter(model, "published", adapter)
    done = []
    before, after = answer(model, tokenizer, rows, [BASE, Candidate("published", adapter)], NEW, done.append)
    for found, directory in ((before, None), (after, adapter)):
        expected = stock_answers(base, directory, tokenizer, rows)
        assert [without_torn_end(text) for text in found] == [without_torn_end(text) for text in expected]
    assert before != after
    assert done == list(range(1, 11))


def test_no_rows_give_no_answers(tiny_model):
    base = tiny_model("llama")
    assert answer(load_model(base), AutoTokenizer.from_pretrained(base), [], [BASE, BASE], NEW) == [[], []]
