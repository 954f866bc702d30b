"""The decoder on a GPU is transformers' model: in fp32 to its rounding, in bf16 within a bound, however documents are packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.modeling import flash_attention, kernels
from orchestrator.modeling.attention import AttentionShape, Documents
from orchestrator.modeling.decoder import adapter_parameters
from orchestrator.modeling.loading import load_model
from orchestrator.modeling.lora import Segment
from tests.unit.modeling.test_decoder import (
    ARCHITECTURES,
    loss_of,
    packed,
    randomised,
    test_a_shared_beginning_changes_no_loss_and_no_gradient,
    test_adapters_in_one_batch_are_each_alone,
    test_gradient_checkpointing_changes_nothing,
    test_gradients_are_those_of_autograd_over_transformers,
    test_packed_gradients_are_those_of_each_document_alone,
    test_packed_logits_are_those_of_transformers_alone,
    test_seeded_dropout_is_the_segments_own,
    test_the_plain_path_is_the_fused_one,
)
from tests.unit.modeling.test_matmul_attention import defined, test_what_is_not_finite_in_one_batch_reaches_no_other

__all__ = [
    "test_a_shared_beginning_changes_no_loss_and_no_gradient",
    "test_adapters_in_one_batch_are_each_alone",
    "test_gradient_checkpointing_changes_nothing",
    "test_gradients_are_those_of_autograd_over_transformers",
    "test_packed_gradients_are_those_of_each_document_alone",
    "test_packed_logits_are_those_of_transformers_alone",
    "test_seeded_dropout_is_the_segments_own",
    "test_the_plain_path_is_the_fused_one",
    "test_what_is_not_finite_in_one_batch_reaches_no_other",
]

LENGTHS = [7, 130, 40, 23, 1, 300, 12]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize(
    ("lengths", "shared"), [([300, 130, 7, 600], 0), ([300, 130, 290], 6), ([40], 0), ([90, 600], 80)]
)
@pytest.mark.parametrize("heads", [(4, 2, 16), (9, 3, 64), (4, 4, 128), (2, 1, 256)])
def test_flash_attention_is_the_definition(
    cuda: torch.device, heads: tuple[int, int, int], lengths: list[int], shared: int, window: int | None
) -> None:
    """Context and gradient, of bf16 inputs, within 1% of what they are in fp64."""
    torch.manual_seed(0)
    shape = AttentionShape(*heads, scale=0.3 * heads[2] ** -0.25)
    tokens = shared + sum(n - shared for n in lengths)
    qkv = torch.randn(tokens, heads[0] + 2 * heads[1], heads[2], device=cuda, dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.randn(tokens, heads[0] * heads[2], device=cuda, dtype=torch.bfloat16)
    assert flash_attention.takes(qkv, shape)
    context = Documents(lengths, cuda, shared=shared)(0, qkv, shape, window)
    (gradient,) = torch.autograd.grad(context, qkv, wanted)
    exact = qkv.detach().double().requires_grad_(True)
    reference = defined(exact, lengths, shared, window, shape)
    (expected,) = torch.autograd.grad(reference, exact, wanted.double())
    assert error(context, reference) < 0.01
    assert error(gradient, expected) < 0.01


def test_flash_attention_gives_the_same_bits_again(cuda: torch.device) -> None:
    """Documents so long that several blocks of keys add to each query's gradient."""
    torch.manual_seed(0)
    shape, lengths = AttentionShape(8, 2, 64, 0.125), [1500, 3000, 700, 2600]
    qkv = torch.randn(sum(lengths), 12, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.randn(sum(lengths), 512, device=cuda, dtype=torch.bfloat16)
    found = []
    for _ in range(5):
        context = Documents(lengths, cuda)(0, qkv, shape, None)
        found.append((context.detach(), torch.autograd.grad(context, qkv, wanted)[0]))
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_stays_near_fp32(
    tiny_model: Any, device: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses within 1%, each gradient within 6% of its norm; by flash attention where there are no soft caps."""
    exact = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=device))
    rough = randomised(load_model(tiny_model(architecture), dtype=torch.bfloat16, device=device))
    for name, parameter in adapter_parameters(rough, "a").items():
        parameter.data = adapter_parameters(exact, "a")[name].data.bfloat16()
    calls, attend = [], flash_attention._attend
    monkeypatch.setattr(flash_attention, "_attend", lambda *arguments: (calls.append(1), attend(*arguments))[1])
    ids = packed(lengths=LENGTHS, device=device)
    losses = []
    for model in (exact, rough):
        loss, _ = loss_of(model, ids, LENGTHS)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    expected = adapter_parameters(exact, "a")
    for name, parameter in adapter_parameters(rough, "a").items():
        assert error(parameter.grad, expected[name].grad) < 0.06, name
    if device == "cuda":
        assert len(calls) == (0 if architecture == "gemma2" else len(rough.layers))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_without_triton_the_results_are_the_same(
    tiny_model: Any, cuda: torch.device, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: losses within 1e-5, gradients within 0.1% of their norm."""
    pytest.importorskip("triton")
    model = randomised(load_model(tiny_model(architecture), dtype=torch.float32, device=cuda))
    ids, found = packed(lengths=LENGTHS, device=cuda), []
    assert kernels._triton(ids) is not None
    for there in (True, False):
        if not there:
            monkeypatch.setattr(kernels, "_triton", lambda tensor: None)
        model.zero_grad()
        loss, _ = loss_of(model, ids, LENGTHS)
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in adapter_parameters(model, "a").items()}))
    (loss, gradients), (expected, expected_gradients) = found
    assert loss == pytest.approx(expected, abs=1e-5)
    assert all(error(gradients[name], expected_gradients[name]) < 1e-3 for name in gradients)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_waits_for_the_gpu(tiny_model: Any, cuda: torch.device, architecture: str, dtype: torch.dtype) -> None:
    """Forward and backward, with two adapters, once the batch is laid out."""
    model = randomised(load_model(tiny_model(architecture), dtype=dtype, device=cuda), "a", 1)
    randomised(model, "b", 2)
    documents, ids = Documents(LENGTHS, cuda), packed(lengths=LENGTHS, device=cuda)
    segments = [Segment("a", 0, 200), Segment("b", 200, len(ids))]
    x = model.embedding(ids).detach().requires_grad_(True)
    rope = model.architecture.ropes[0].table(documents.positions)
    cos, sin = (part[:, None].to(dtype) for part in rope)

    def there_and_back() -> None:
        for layer in model.layers:
            layer(x, cos, sin, documents, segments).sum().backward()

    there_and_back()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there_and_back()
    finally:
        torch.cuda.set_sync_debug_mode("default")
