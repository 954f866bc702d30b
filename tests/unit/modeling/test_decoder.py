"""The fused decoder is the Hugging Face model, and packing changes nothing: logits, losses and gradients in fp32."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.errors import ModelError
from orchestrator.modeling import decoder
from orchestrator.modeling.attention import Documents
from orchestrator.modeling.decoder import adapter_parameters, adapter_tensors, add_adapter
from orchestrator.modeling.loading import full_tensors, load_model, train_everything
from orchestrator.modeling.lora import LoraShape, Segment
from orchestrator.modeling.plain import PlainDecoder

ARCHITECTURES = ["llama", "llama-untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
LENGTHS = [7, 23, 40, 23, 1, 12]


def packed(seed=0, lengths=LENGTHS, vocab=250, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab, (sum(lengths),), generator=generator).to(device)


def randomised(model, slot="a", seed=1, **shape):
    """An adapter whose B is not zero, so that every path carries a gradient."""
    add_adapter(model, slot, LoraShape(**{"rank": 4, "alpha": 8.0} | shape), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model, slot).items():
        parameter.requires_grad_(True)
        if name.endswith("lora_b"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
    return model


def loss_of(model, ids, lengths, slot="a", seed=None):
    at = torch.arange(len(ids) - 1)
    ends = torch.tensor(lengths).cumsum(0) - 1
    at = at[~torch.isin(at, ends)].to(ids.device)
    weights = torch.full((len(at),), 1 / len(at), device=ids.device)
    segments = [Segment(slot, 0, len(ids), seed)]
    return model.loss(ids, Documents(lengths, ids.device), ids[at + 1], at, weights, segments)


def stock(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logits_are_those_of_transformers_alone(tiny_model, device, architecture):
    directory = tiny_model(architecture)
    ours = load_model(directory, dtype=torch.float32, device=device)
    theirs = stock(directory).to(device)
    ids = packed(device=device)
    documents = Documents(LENGTHS, device)
    assert not isinstance(ours, PlainDecoder)
    with torch.no_grad():
        logits = ours.head(ours(ids, documents.positions, documents))
        for document, mine in zip(ids.split(LENGTHS), logits.split(LENGTHS), strict=True):
            torch.testing.assert_close(mine, theirs(document[None]).logits[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_gradients_are_those_of_each_document_alone(tiny_model, device, architecture):
    model = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=device))
    ids = packed(device=device)
    loss, _ = loss_of(model, ids, LENGTHS)
    loss.backward()
    together = {n: p.grad.clone() for n, p in adapter_parameters(model, "a").items()}
    labelled = sum(n - 1 for n in LENGTHS)
    model.zero_grad()
    total = 0.0
    for document in ids.split(LENGTHS):
        if len(document) > 1:
            alone, _ = loss_of(model, document, [len(document)])
            alone = alone * (len(document) - 1) / labelled
            alone.backward()
            total += alone.item()
    assert loss.item() == pytest.approx(total, abs=1e-5)
    for name, parameter in adapter_parameters(model, "a").items():
        torch.testing.assert_close(parameter.grad, together[name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("architecture", "length"), [*((one, 30) for one in ARCHITECTURES), ("llama", 600)])
def test_gradients_are_those_of_autograd_over_transformers(tiny_model, device, architecture, length):
    """Full tuning: every weight's gradient, by its Hugging Face name. Of 600 tokens the attention weights are computed again."""
    directory = tiny_model(architecture)
    ours = load_model(directory, dtype=torch.float32, device=device)
    train_everything(ours)
    theirs = stock(directory).to(device)
    ids = packed(lengths=[length], device=device)
    loss, _ = loss_of(ours, ids, [length], slot=None)
    loss.backward()
    reference = theirs(ids[None], labels=ids[None]).loss
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), abs=1e-5)
    gradients = full_tensors(ours, {n: p.grad for n, p in ours.named_parameters()})
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_adapters_in_one_batch_are_each_alone(tiny_model, device, architecture):
    """Mixed ranks and scalings, and tokens of the base between them: losses and gradients."""
    model = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=device), "a", 1)
    randomised(model, "b", 2, rank=2, alpha=3.0, rslora=True, targets=frozenset({"q_proj", "down_proj"}))
    ids = packed(lengths=[20, 30, 25], device=device)
    documents = Documents([20, 30, 25], device)
    segments = [Segment("a", 0, 20), Segment(None, 20, 50), Segment("b", 50, 75)]
    hidden = model(ids, documents.positions, documents, segments)
    (hidden[:20].sum() + hidden[50:].square().sum()).backward()
    mixed = {s: {n: p.grad.clone() for n, p in adapter_parameters(model, s).items()} for s in "ab"}
    for slot, rows in (("a", slice(0, 20)), (None, slice(20, 50)), ("b", slice(50, 75))):
        model.zero_grad()
        own = ids[rows]
        alone = Documents([len(own)], device)
        out = model(own, alone.positions, alone, [Segment(slot, 0, len(own))])
        torch.testing.assert_close(out, hidden[rows], atol=1e-5, rtol=1e-5)
        if slot:
            (out.sum() if slot == "a" else out.square().sum()).backward()
            for name, parameter in adapter_parameters(model, slot).items():
                torch.testing.assert_close(parameter.grad, mixed[slot][name], atol=1e-4, rtol=1e-3, msg=name)


def test_gradient_checkpointing_changes_nothing(tiny_model, device):
    model = randomised(load_model(tiny_model("llama"), dtype=torch.float32, device=device))
    ids = packed(device=device)
    loss_of(model, ids, LENGTHS)[0].backward()
    plain = {n: p.grad.clone() for n, p in adapter_parameters(model, "a").items()}
    model.zero_grad()
    model.gradient_checkpointing = True
    loss_of(model, ids, LENGTHS)[0].backward()
    for name, parameter in adapter_parameters(model, "a").items():
        torch.testing.assert_close(parameter.grad, plain[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_a_lean_pass_keeps_less_and_changes_nothing(tiny_model, device, architecture, monkeypatch):
    model = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=device), dropout=0.2)
    ids, made = packed(device=device), []

    def seen(*arguments: Any, **options: Any) -> torch.Tensor:
        made.append(weakref.ref(result := unseen(*arguments, **options)))
        return result

    unseen = decoder.gated_activation
    monkeypatch.setattr(decoder, "gated_activation", seen)
    gradients = []
    for model.lean in (False, True):
        made.clear()
        model.zero_grad()
        loss = loss_of(model, ids, LENGTHS, seed=3)[0]
        assert [reference() is None for reference in made] == [model.lean] * len(model.layers)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in adapter_parameters(model, "a").items()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_plain_path_is_the_fused_one(tiny_model, device, architecture):
    fused = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=device))
    plain = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=device, plain=True))
    assert isinstance(plain, PlainDecoder)
    tensors = adapter_tensors(fused, "a")
    assert tensors.keys() == adapter_tensors(plain, "a").keys()
    for module in plain.modules():
        if getattr(module, "slots", None):
            projection = module.projections[0].name
            a, b = module.parameters_of("a")
            a.data = tensors[f"base_model.model.{projection}.lora_A.weight"].clone()
            b.data = tensors[f"base_model.model.{projection}.lora_B.weight"].clone()
    ids = packed(lengths=[25], device=device)
    one, two = loss_of(fused, ids, [25])[0], loss_of(plain, ids, [25])[0]
    one.backward()
    two.backward()
    assert one.item() == pytest.approx(two.item(), abs=1e-5)
    gradients = adapter_tensors(fused, "a", {n: p.grad for n, p in adapter_parameters(fused, "a").items()})
    expected = adapter_tensors(plain, "a", {n: p.grad for n, p in adapter_parameters(plain, "a").items()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3, msg=name)


def test_dropout_is_inverted_and_seeded(tiny_model):
    model = randomised(load_model(tiny_model("llama"), dtype=torch.float32), dropout=0.5)
    ids, runs = packed(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(loss_of(model, ids, LENGTHS)[0].item())
    model.eval()
    assert runs[0] == runs[1] != runs[2]
    assert loss_of(model, ids, LENGTHS)[0].item() not in runs


def test_seeded_dropout_is_the_segments_own(tiny_model, device):
    """Loss and gradient of a segment are the same in another batch, after other draws, and where layers are recomputed."""
    model = randomised(load_model(tiny_model("llama"), dtype=torch.float32, device=device), dropout=0.5)
    randomised(model, "b", 2, dropout=0.3)
    own, other = packed(lengths=[20], device=device), packed(1, [30], device=device)

    def result(seed, beside=False, recompute=False):
        model.zero_grad()
        model.gradient_checkpointing = recompute
        ids = torch.cat([other, own]) if beside else own
        start, at = len(ids) - 20, torch.arange(len(ids) - 20, len(ids) - 1, device=device)
        documents = Documents([30, 20] if beside else [20], device)
        segments = [Segment("b", 0, 30, 9)] if beside else []
        segments.append(Segment("a", start, len(ids), seed))
        weights = torch.full((19,), 1 / 19, device=device)
        loss, each = model.loss(ids, documents, ids[at + 1], at, weights, segments)
        loss.backward()
        return each, {n: p.grad.clone() for n, p in adapter_parameters(model, "a").items()}

    losses, gradients = result(5)
    for options in ({"recompute": True}, {"beside": True}, {"beside": True, "recompute": True}):
        again, also = result(5, **options)
        torch.testing.assert_close(again, losses, atol=1e-5, rtol=1e-5)
        for name, gradient in also.items():
            torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-3, msg=name)
    assert (result(6)[0] - losses).abs().max() > 1e-3


def test_each_linear_drops_by_itself(tiny_model):
    model = randomised(load_model(tiny_model("llama"), dtype=torch.float32), dropout=0.5)
    first, second = (layer.o for layer in model.layers)
    x = torch.ones(7, first.in_features)
    for linear in (first, second):
        linear.parameters_of("a")[0].data.fill_(1.0)
        linear.parameters_of("a")[1].data.fill_(1.0)
        linear.weight.data.zero_()
    outs = [linear(x, [Segment("a", 0, 7, seed)]) for linear, seed in ((first, 3), (first, 3), (second, 3), (first, 4))]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[3])


def test_bfloat16_stays_near_fp32(tiny_model):
    exact = randomised(load_model(tiny_model("llama"), dtype=torch.float32))
    rough = randomised(load_model(tiny_model("llama"), dtype=torch.bfloat16))
    for name, parameter in adapter_parameters(rough, "a").items():
        parameter.data = adapter_parameters(exact, "a")[name].data.bfloat16()
    ids = packed()
    assert loss_of(rough, ids, LENGTHS)[0].item() == pytest.approx(loss_of(exact, ids, LENGTHS)[0].item(), rel=0.01)


def test_a_target_that_matches_nothing_lists_what_does(tiny_model):
    model = load_model(tiny_model("llama"), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"'query'.*q_proj"):
        add_adapter(model, "a", LoraShape(4, 8.0, targets=frozenset({"query"})), 0)


def test_a_rank_above_the_width_is_refused(tiny_model):
    model = load_model(tiny_model("llama"), dtype=torch.float32)
    with pytest.raises(ModelError, match="above the width"):
        add_adapter(model, "a", LoraShape(4096, 8.0), 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_beginning_changes_no_loss_and_no_gradient(tiny_model, device, architecture):
    """Five documents that begin with the same 11 tokens, computed once, against each with its own copy."""
    model = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=device))
    lengths, shared = [20, 31, 14, 31, 12], 11
    documents = list(packed(lengths=lengths, device=device).split(lengths))
    for document in documents:
        document[:shared] = documents[0][:shared]
    results = []
    for common in (0, shared):
        model.zero_grad()
        ids = torch.cat([documents[0][:common], *(d[common:] for d in documents)])
        layout = Documents(lengths, device, shared=common)
        assert len(ids) == layout.tokens == len(layout.positions)
        # labels from the second own token on, so that both layouts have the same ones
        starts = [common + sum(n - common for n in lengths[:i]) + (shared - common) for i in range(len(lengths))]
        at = torch.cat([torch.arange(s, s + n - shared - 1) for s, n in zip(starts, lengths, strict=True)]).to(device)
        weights = torch.full((len(at),), 1 / len(at), device=device)
        loss, each = model.loss(ids, layout, ids[at + 1], at, weights, [Segment("a", 0, len(ids))])
        loss.backward()
        results.append((each, {n: p.grad.clone() for n, p in adapter_parameters(model, "a").items()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(gradient, results[0][1][name], atol=1e-6, rtol=1e-3, msg=name)
