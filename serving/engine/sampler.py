"""From logits to tokens, for all answers of a step together.

Chance is counted, not drawn from a common source: an answer's n-th token depends on its seed and on n alone, so the same
request has the same answer in any batch and after a preemption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.protocol import Sampling


@dataclass(frozen=True)
class Choice:
    """The choice of one token."""

    sampling: Sampling
    seed: int
    number: int
    """Of this token in its answer."""


def choose(logits: Tensor, choices: Sequence[Choice]) -> list[int | None]:
    """A token for each row of logits ([answers, vocab], fp32); None where they are not finite."""
    best, tokens = logits.max(-1)
    rows = [n for n, choice in enumerate(choices) if choice.sampling.temperature > 0]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _sampled(logits[index], [choices[n] for n in rows])
    finite = torch.isfinite(best).tolist()
    return [token if known else None for token, known in zip(tokens.tolist(), finite, strict=True)]


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) that only its two arguments decide."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _sampled(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Inverse of the cumulative distribution at each answer's own number: [answers]."""
    device = logits.device
    vocab = logits.shape[1]
    # a lower one than this is the likeliest token, and would only divide by almost nothing
    temperature = torch.tensor([max(c.sampling.temperature, 1e-5) for c in choices], device=device)[:, None]
    probabilities = torch.softmax(logits / temperature, -1)
    at = torch.tensor([uniform(c.seed, c.number) for c in choices], dtype=torch.float64, device=device)[:, None]
    limited = [n for n, c in enumerate(choices) if 0 < c.sampling.top_k < vocab or c.sampling.top_p < 1.0]
    tokens = torch.empty(len(choices), dtype=torch.long, device=device)
    free = sorted(set(range(len(choices))) - set(limited))
    if free:
        rows = torch.tensor(free, device=device)
        tokens[rows] = _pick(probabilities[rows], at[rows])
    if limited:
        rows = torch.tensor(limited, device=device)
        likely, order = _likeliest(probabilities[rows], [choices[n].sampling for n in limited])
        tokens[rows] = order.gather(1, _pick(likely, at[rows])[:, None])[:, 0]
    return tokens


def _pick(weights: Tensor, at: Tensor) -> Tensor:
    """The first column whose cumulative weight exceeds `at` times all: [rows, columns] → [rows]."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, at * total, right=True)[:, 0]
    # rounding can put the number at the very end, where columns of no weight may stand
    last = (weights > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(chosen, last)


def _likeliest(probabilities: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order, those outside top_k and top_p zero, and whose they are: two [rows, width].

    Sorting a whole vocabulary costs more than a small model's layer, so only as many are sorted as are needed.
    """
    device, vocab = probabilities.device, probabilities.shape[1]
    top_k = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in samplings], device=device)[:, None]
    width = min(_WIDTH, vocab)
    while True:
        likely, order = probabilities.topk(width)
        before = likely.cumsum(-1, dtype=torch.float64) - likely
        kept = (before < top_p) & (torch.arange(width, device=device) < top_k)
        if width == vocab or not kept[:, -1].any():
            return likely * kept, order
        width = min(16 * width, vocab)


_WIDTH = 256
