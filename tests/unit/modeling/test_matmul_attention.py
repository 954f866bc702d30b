"""The attention kernels against the definition of attention, written out document by document.

The GPU's kernel itself runs in `tests/gpu`; here the definition stands in its place, so that what is around it is tested.
"""

from __future__ import annotations

import pytest
import torch

from orchestrator.modeling import flash_attention
from orchestrator.modeling.attention import AttentionShape, Documents

SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=8, scale=0.3)


def defined(
    qkv: torch.Tensor, lengths: list[int], shared: int, window: int | None, shape: AttentionShape = SHAPE
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v of each document with its shared beginning; the beginning's own context from the first."""
    out, start = [], shared
    for number, length in enumerate(lengths):
        stop = start + length - shared
        own = torch.cat([qkv[:shared], qkv[start:stop]])
        q, k, v = own.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        k, v = (part.repeat_interleave(shape.heads // shape.kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * shape.scale
        distance = (torch.arange(length)[:, None] - torch.arange(length)).to(qkv.device)
        scores = scores.masked_fill((distance < 0) | (distance >= (window or length)), float("-inf"))
        context = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        out.append(context if number == 0 else context[shared:])
        start = stop
    return torch.cat(out)


@pytest.fixture
def flash_by_definition(monkeypatch):
    """`flash` anywhere and in any dtype, each document's queries against its keys by the definition."""

    def attend(q, k, v, layout, scale, window):
        out = []
        for number in range(len(layout.queries) - 1):
            queries, keys = (slice(*borders[number : number + 2]) for borders in (layout.queries, layout.keys))
            mine = [part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k[keys], v[keys])]
            scores = torch.einsum("qhd,khd->hqk", q[queries], mine[0]) * scale
            count, length = scores.shape[1:]
            assert count <= layout.most_queries
            assert length <= layout.most_keys
            distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
            scores = scores.masked_fill((distance < 0) | (distance >= (window or length)), float("-inf"))
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), mine[1]))
        return (torch.cat(out),)

    def backward(given, q, k, v, out, more, *rest):
        with torch.enable_grad():
            inputs = [part.detach().requires_grad_(True) for part in (q, k, v)]
            return torch.autograd.grad(attend(*inputs, *rest)[0], inputs, given)

    monkeypatch.setattr(flash_attention, "_attend", attend)
    monkeypatch.setattr(flash_attention, "_attend_backward", backward)
    monkeypatch.setattr(flash_attention, "takes", lambda qkv, shape: True)


@pytest.mark.usefixtures("flash_by_definition")
@pytest.mark.parametrize("kernel", ["matmul", "flash"])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([7], id="one-short"),
        pytest.param([40, 9, 33, 31, 40], id="several-alike"),
        pytest.param([300, 130, 290, 129], id="several-chunks"),
        pytest.param([600, 20], id="recomputed-weights"),
    ],
)
@pytest.mark.parametrize("shared", [0, 1, 6])
@pytest.mark.parametrize("window", [None, 5, 150])
def test_context_and_gradient_are_those_of_the_definition(lengths, shared, window, kernel):
    torch.manual_seed(0)
    tokens = shared + sum(n - shared for n in lengths)
    qkv = torch.randn(tokens, SHAPE.heads + 2 * SHAPE.kv_heads, SHAPE.head_dim, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(tokens, SHAPE.heads * SHAPE.head_dim, dtype=torch.float64)

    context = Documents(lengths, kernel=kernel, shared=shared)(0, qkv, SHAPE, window)
    (gradient,) = torch.autograd.grad(context, qkv, wanted)

    reference = defined(qkv, lengths, shared, window)
    (expected,) = torch.autograd.grad(reference, qkv, wanted)
    torch.testing.assert_close(context, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)  # shared gradients are summed in fp32


BATCHES = [([40, 9, 33], 6), ([31, 40], 0), ([300, 20, 290], 6), ([12, 50], 11), ([7], 0)]
"""(lengths, shared) of packed batches of which some share, equally much or not, and some do not."""


@pytest.mark.usefixtures("flash_by_definition")
@pytest.mark.parametrize("kernel", ["matmul", "flash"])
@pytest.mark.parametrize("window", [None, 5])
def test_side_by_side_each_batch_is_what_it_is_alone(kernel, window):
    """To fp64's rounding: context and gradient."""
    torch.manual_seed(0)
    several = [Documents(lengths, kernel=kernel, shared=shared) for lengths, shared in BATCHES]
    joined = Documents.side_by_side(several)
    sizes = [documents.tokens for documents in several]
    assert joined.tokens == sum(sizes)
    assert torch.equal(joined.positions, torch.cat([documents.positions for documents in several]))
    shape = (joined.tokens, SHAPE.heads + 2 * SHAPE.kv_heads, SHAPE.head_dim)
    qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(joined.tokens, SHAPE.heads * SHAPE.head_dim, dtype=torch.float64)
    context = joined(0, qkv, SHAPE, window)
    (gradient,) = torch.autograd.grad(context, qkv, wanted)
    alone = [d(0, part, SHAPE, window) for d, part in zip(several, qkv.split(sizes), strict=True)]
    (expected,) = torch.autograd.grad(torch.cat(alone), qkv, wanted)
    torch.testing.assert_close(context, torch.cat(alone), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", range(len(BATCHES)))
def test_what_is_not_finite_in_one_batch_reaches_no_other(device, dtype, softcap, broken):
    """To the last bit: context and gradient of the others are those beside a sound batch."""
    torch.manual_seed(0)
    several = [Documents(lengths, device, shared=shared) for lengths, shared in BATCHES]
    joined, sizes = Documents.side_by_side(several), [documents.tokens for documents in several]
    shape = AttentionShape(SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.scale, softcap)
    sound = torch.randn(joined.tokens, SHAPE.heads + 2 * SHAPE.kv_heads, SHAPE.head_dim).to(device, dtype)
    wanted = torch.randn(joined.tokens, SHAPE.heads * SHAPE.head_dim).to(device, dtype)
    results = []
    for bad in (None, float("nan"), float("inf")):
        qkv, out = sound.clone(), wanted.clone()
        if bad is not None:
            qkv.split(sizes)[broken].fill_(bad)
            out.split(sizes)[broken].fill_(bad)
        qkv.requires_grad_(True)
        context = joined(0, qkv, shape, 5)
        (gradient,) = torch.autograd.grad(context, qkv, out)
        results.append([*context.detach().split(sizes), *gradient.split(sizes)])
    for number, (expected, *found) in enumerate(zip(*results, strict=True)):
        if number % len(sizes) != broken:
            assert all(torch.equal(expected, one) for one in found)
