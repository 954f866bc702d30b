"""The parts of `kernels` that cost a GPU most, each as one launch, in Triton. The only module that imports triton.

By torch's operations they are three to ten launches with as many passes over memory; a network of few parameters waits for the
launches, a larger one for the passes. All compute in fp32, whatever the dtype of what they read and write.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _VOCABULARY, _HEADS = 1024, 4096, 8


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activated(gate, silu: tl.constexpr):
    """The activation, and its derivative."""
    if silu:
        s = _sigmoid(gate)
        return gate * s, s * (1.0 + gate * (1.0 - s))
    square = gate * gate
    t = 2.0 * _sigmoid(2.0 * 0.7978845608028654 * gate * (1.0 + 0.044715 * square)) - 1.0
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * square)
    return 0.5 * gate * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * slope


@triton.jit
def _gate(gate_up, out, size, silu: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, inside).to(tl.float32)
    activated, _ = _activated(gate, silu)
    tl.store(out + row * size + column, activated * up, inside)


@triton.jit
def _gate_backward(given, gate_up, out, size, silu: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, inside).to(tl.float32)
    grad = tl.load(given + row * size + column, inside).to(tl.float32)
    activated, slope = _activated(gate, silu)
    tl.store(out + row * 2 * size + column, grad * up * slope, inside)
    tl.store(out + row * 2 * size + size + column, grad * activated, inside)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) · up: [tokens, 2·size] → [tokens, size]."""
    gate_up, size = gate_up.contiguous(), gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), size)
    _gate[len(out), triton.cdiv(size, _COLUMNS)](gate_up, out, size, activation == "silu", _COLUMNS)
    return out


def gate_backward(given: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """The gradient of gate_up [tokens, 2·size] from that of the result [tokens, size]."""
    given, gate_up, size = given.contiguous(), gate_up.contiguous(), given.shape[1]
    out = torch.empty_like(gate_up)
    grid = len(out), triton.cdiv(size, _COLUMNS)
    _gate_backward[grid](given, gate_up, out, size, activation == "silu", _COLUMNS)
    return out


@triton.jit
def _rotate(read, write, cos, sin, row_size, heads, rotated, sign, half: tl.constexpr, block: tl.constexpr, width: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block + tl.arange(0, block)[:, None]
    column = tl.arange(0, width)[None, :]
    inside = (head < heads) & (column < half)
    at = row * row_size + head * 2 * half + column
    first = tl.load(read + at, inside).to(tl.float32)
    second = tl.load(read + at + half, inside).to(tl.float32)
    turns = (head < rotated) & (column < half)
    c = tl.load(cos + row * half + column, turns, 1.0).to(tl.float32)
    s = tl.load(sin + row * half + column, turns, 0.0).to(tl.float32) * sign
    tl.store(write + at, first * c - second * s, inside)
    tl.store(write + at + half, second * c + first * s, inside)


def rotate(read: Tensor, write: Tensor, rotated: int, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Rotate the leading heads of each token from `read` to `write`, which may be the same; then the others stay untouched.

    Args:
        read, write: [tokens, heads · head_dim], contiguous.
        cos, sin: [tokens, 1, head_dim / 2], contiguous.
        back: by the opposite angles.
    """
    half, row_size = cos.shape[-1], read.shape[1]
    heads = rotated if read is write else row_size // (2 * half)
    grid = len(read), triton.cdiv(heads, _HEADS)
    width = triton.next_power_of_2(half)
    _rotate[grid](read, write, cos, sin, row_size, heads, rotated, -1.0 if back else 1.0, half, _HEADS, width)


@triton.jit
def _cross_entropy(logits, labels, weights, losses, vocabulary: tl.constexpr, wanted: tl.constexpr, block: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    highest, total = -float("inf"), 0.0
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        x = tl.load(logits + column, column < vocabulary, -float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
        highest = higher
    normaliser = highest + tl.log(total)
    label = tl.load(labels + row)
    tl.store(losses + row, normaliser - tl.load(logits + label).to(tl.float32))
    if wanted:
        tl.debug_barrier()  # the label's logit is read before it is written
        weight = tl.load(weights + row)
        for start in range(0, vocabulary, block):
            column = start + tl.arange(0, block)
            x = tl.load(logits + column, column < vocabulary, -float("inf")).to(tl.float32)
            slope = tl.exp(x - normaliser) - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, slope * weight, column < vocabulary)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, losses: Tensor, wanted: bool) -> None:
    """Each row's loss, and in place of its logits their gradient, times its weight.

    Args:
        logits: [rows, vocabulary], contiguous.
        labels, weights, losses: [rows], int64, fp32, and fp32 to be written.
        wanted: whether the gradient is.
    """
    _cross_entropy[(len(logits),)](logits, labels, weights, losses, logits.shape[1], wanted, _VOCABULARY, num_warps=8)


def tried(device: torch.device) -> Any:
    """One launch, or the error of a machine on which Triton cannot compile."""
    return gate(torch.zeros(1, 16, device=device), "silu").sum().item()
