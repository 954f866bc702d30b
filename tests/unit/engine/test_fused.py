"""The kernels beside torch's operations, and engines with them beside engines without. About 20 seconds."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from orchestrator.modeling.architecture import Architecture, fused_architecture
from orchestrator.modeling.attention import AttentionShape
from orchestrator.modeling.kernels import gated_activation, rms_norm, rotate
from serving.engine import kernels as compiled
from serving.engine.attention import KeyValueCache, Span, StepAttention
from serving.engine.fused import FusedAttention
from serving.engine.kernels import Kernels, kernels

CPU = torch.device("cpu")
DIGESTS = ("sha256:a", "sha256:b", "sha256:c")
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2}}
"""bf16: one unit in the last place; torch rounds intermediate results that the kernels keep in fp32."""

both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def kernels_of(dtype: torch.dtype) -> Kernels:
    found = kernels(dtype, CPU)
    assert found is not None, "the tests need a C++ compiler (Debian and Ubuntu: apt-get install g++)"
    return found


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE[expected.dtype], equal_nan=True)


@both
@pytest.mark.parametrize("size", [7, 64, 576])
def test_residual_and_norm(dtype, size):
    x, add, weight, post = (
        random(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(5, size), (5, size), (size,), (size,)])
    )
    for offset, with_post in ((0.0, False), (1.0, True)):
        residual, out = x.clone(), torch.empty_like(x)
        kernels_of(dtype).add_norm(residual, add, post if with_post else None, out, weight, 1e-6, offset)
        expected = x + (rms_norm(add, post, 1e-6, offset) if with_post else add)
        same(residual, expected)
        same(out, rms_norm(expected, weight, 1e-6, offset))
    kernels_of(dtype).add_norm(x, None, None, out, weight, 1e-6, 0.0)
    same(out, rms_norm(x, weight, 1e-6, 0.0))


@both
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(dtype, activation):
    gate_up = 8 * random(3, 2 * 50, dtype=dtype)
    gate_up[0, :4] = torch.tensor([-1e4, 1e4, -90.0, 90.0])
    gate_up[1, 7] = math.nan
    found = kernels_of(dtype).gate(gate_up, activation)
    same(found, gated_activation(gate_up, activation))
    assert found[1, 7].isnan()
    assert found.isnan().sum() == 1


@both
def test_rotation_norms_and_where_keys_and_values_go(dtype):
    heads, kv_heads, dim, tokens = 4, 2, 16, 5
    qkv = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = random(tokens, dim // 2, seed=1)
    cos, sin = (table.to(dtype).float() for table in (angles.cos(), angles.sin()))
    norms = random(dim, dtype=dtype, seed=2), random(dim, dtype=dtype, seed=3)
    memory, places = torch.zeros(2 * kv_heads, 64, dim, dtype=dtype), torch.tensor([40, 3, 4, 63, 0])
    for given in (None, norms):
        q, k, v = qkv.clone().split([heads, kv_heads, kv_heads], 1)
        if given:
            q, k = rms_norm(q, given[0], 1e-6, 1.0), rms_norm(k, given[1], 1e-6, 1.0)
        flat = torch.cat([q, k, v], 1).flatten(1)
        expected = rotate(flat, heads + kv_heads, cos[:, None].to(dtype), sin[:, None].to(dtype)).view_as(qkv)
        found = qkv.clone()
        kernels_of(dtype).rotate_store(found, cos, sin, given, memory, places, heads, 1e-6, 1.0)
        same(found, expected)
        assert torch.equal(memory[:, places], found[:, heads:].transpose(0, 1))
        assert memory.count_nonzero(-1).count_nonzero() == memory[:, places].count_nonzero(-1).count_nonzero()


@pytest.fixture(scope="module")
def tiny_architecture(tiny_model) -> Architecture:
    found = fused_architecture(AutoConfig.from_pretrained(tiny_model("llama")))
    assert found is not None
    return found


@both
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_of_new_tokens_and_of_chunks(tiny_architecture, dtype, window, softcap):
    """Sequences of one block and of several, one that shares blocks with another, and a chunk of a prompt beside them."""
    a = tiny_architecture
    shape = AttentionShape(a.num_heads, a.num_kv_heads, a.head_dim, 0.3, softcap)
    spans = [Span([5], 1, 1), Span([2, 7, 9], 37, 1), Span([2, 8], 32, 1), Span([1, 3], 30, 12), Span([4], 9, 2)]
    cache = KeyValueCache(a, 12, 16, dtype, CPU)
    cache.memory.copy_(random(*cache.memory.shape, dtype=dtype, seed=4))
    tokens = sum(span.count for span in spans)
    qkv = random(tokens, a.num_heads + 2 * a.num_kv_heads, a.head_dim, dtype=dtype)
    heads = a.num_kv_heads, a.num_heads // a.num_kv_heads
    plain, fused = StepAttention(cache, spans, *heads), FusedAttention(kernels_of(dtype), cache, spans, *heads)
    expected = plain(0, qkv, shape, window)
    assert torch.equal(fused.places, plain.places)
    found = fused.attend(0, qkv, shape, window)
    near = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    qkv[1, 0] = math.nan
    found = fused.attend(0, qkv, shape, window)
    assert found[1].isnan().any()
    assert not found[torch.arange(tokens) != 1].isnan().any()


@both
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
def test_updates_of_many_adapters(dtype, tokens):
    """Mixed ranks, one adapter without the second projection, widths that fill no vector, tokens without an adapter."""
    width, sizes, ranks = 37, (40, 13), ((3, 8), (16, None))
    starts, outputs = (0, 40), 53
    x, y = random(3 * tokens, width, dtype=dtype), random(3 * tokens, outputs, dtype=dtype, seed=1)
    rows, expected, kept = [], y.float(), []
    for slot, of_slot in enumerate(ranks):
        part = slice((slot + 1) * tokens, (slot + 2) * tokens)
        for projection, rank in enumerate(of_slot):
            if rank is None:
                rows.append([0, 0, 0, 0])
                continue
            a, b = (
                random(rank, width, dtype=dtype, seed=2 + slot),
                random(rank, sizes[projection], dtype=dtype, seed=9 + slot),
            )
            kept += [a, b]
            rows.append([a.data_ptr(), b.data_ptr(), rank | starts[projection] << 32, sizes[projection]])
            low = x[part].float() @ a.float().t()
            expected[part, starts[projection] : starts[projection] + sizes[projection]] += low @ b.float()
    table = torch.tensor(rows, dtype=torch.int64)
    segments = torch.tensor([[0, tokens, 2 * tokens], [1, 2 * tokens, 3 * tokens]], dtype=torch.int32)
    kernels_of(dtype).lora(x, y, table.data_ptr(), 2, segments, 16)
    torch.testing.assert_close(
        y, expected.to(dtype), **TOLERANCE[dtype] | {"atol": 1e-4 if dtype is torch.float32 else 0.1}
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_an_engine_with_kernels_answers_as_one_without(architecture, make_engine, peft_adapters, prompts, greedy, run):
    found = []
    for fuse in (True, False):
        core = make_engine(architecture, fuse=fuse)
        for digest, directory in zip(DIGESTS, peft_adapters(architecture), strict=True):
            core.load(digest, directory)
        found.append([d.tokens for d in run(core, [greedy(p, d) for p in prompts for d in (None, *DIGESTS)])])
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) > len(prompts)  # the adapters say different things


@pytest.fixture
def without_compiler(monkeypatch) -> Iterator[None]:
    for cached in (compiled._library, compiled.kernels):
        cached.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    yield
    for cached in (compiled._library, compiled.kernels):
        cached.cache_clear()


def test_without_a_compiler_the_engine_answers_the_same_and_says_what_is_missing(
    without_compiler, caplog, make_engine, prompts, greedy, run
):
    with caplog.at_level(logging.WARNING):
        core = make_engine()
    assert "apt-get install g++" in caplog.text
    assert core.network._fused is None
    slow = run(core, [greedy(prompts[1])])[0].tokens
    assert slow == run(make_engine(fuse=False), [greedy(prompts[1])])[0].tokens


def test_what_was_compiled_is_there_for_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled._library.cache_clear()
    assert compiled._library() is not None
    (kept,) = (tmp_path / "adaptory/kernels").iterdir()
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled twice"))
    compiled._library.cache_clear()
    assert compiled._library() is not None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept.unlink()  # this process has it in memory
    kept.write_bytes(b"cut")  # by a machine that went down
    compiled._library.cache_clear()
    assert compiled._library() is not None
    compiled._library.cache_clear()
