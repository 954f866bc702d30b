"""Greedy answers to many prompts at once, each with its own adapter slot or none: what evaluation needs of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.modeling.attention import AttentionShape, Documents
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.lora import Segment
from orchestrator.modeling.plain import PlainDecoder


@dataclass(frozen=True)
class Prompt:
    ids: Sequence[int]
    slot: str | None = None


@torch.no_grad()
def generate(
    model: Decoder | PlainDecoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    end: frozenset[int],
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Continue each prompt greedily until an end token or the limit; the end token is not returned.

    Args:
        batch_size: prompts decoded together.
        progress: told how many prompts are answered.
    """
    model.eval()
    if isinstance(model, PlainDecoder):
        return _one_by_one(model, prompts, max_new_tokens, end, progress)
    answers: list[list[int]] = [[] for _ in prompts]
    # similar lengths and equal slots together: less padding in the cache, fewer segments
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    done = 0
    for first in range(0, len(order), batch_size):
        chosen = sorted(order[first : first + batch_size], key=lambda i: (prompts[i].slot or "", i))
        for i, answer in zip(chosen, _batch(model, [prompts[i] for i in chosen], max_new_tokens, end), strict=True):
            answers[i] = answer
        done += len(chosen)
        progress(done)
    return answers


def _batch(model: Decoder, prompts: list[Prompt], max_new_tokens: int, end: frozenset[int]) -> list[list[int]]:
    lengths = [len(p.ids) for p in prompts]
    device = model.norm.weight.device
    cache = _Cache(model, lengths, max(lengths) + max_new_tokens, device)
    ids = torch.tensor([t for p in prompts for t in p.ids], device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    hidden = model(ids, cache.documents.positions, cache, _segments(prompts, lengths), last)
    chosen = model.head(hidden).argmax(-1)

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # of the cache: which prompt each one answers
    unfinished = set(rows)
    for _ in range(max_new_tokens):
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in unfinished:
                continue
            if token in end:
                unfinished.remove(row)
                continue
            answers[row].append(token)
            if len(answers[row]) == max_new_tokens:
                unfinished.remove(row)
        if not unfinished:
            break
        if len(unfinished) <= _COMPACT * len(rows):
            keep = [n for n, row in enumerate(rows) if row in unfinished]
            rows, chosen = [rows[n] for n in keep], chosen[torch.tensor(keep, device=device)]
            cache.keep(keep)
        hidden = model(chosen, cache.next_positions(), cache, _segments([prompts[r] for r in rows], [1] * len(rows)))
        chosen = model.head(hidden).argmax(-1)
    return answers


_COMPACT = 0.75
"""The cache is rewritten without its finished sequences when so few are left: rewriting it for each one costs more."""


def _segments(prompts: Sequence[Prompt], lengths: Sequence[int]) -> list[Segment]:
    """Neighbours that use the same slot share a segment."""
    out: list[Segment] = []
    start = 0
    for prompt, length in zip(prompts, lengths, strict=True):
        if out and out[-1].slot == prompt.slot:
            out[-1] = Segment(prompt.slot, out[-1].start, start + length)
        else:
            out.append(Segment(prompt.slot, start, start + length))
        start += length
    return out


class _Cache:
    """Keys and values of a batch: filled by the packed prompts, then one token a step. An `Attention`."""

    def __init__(self, model: Decoder, lengths: Sequence[int], capacity: int, device: Any):
        a = model.architecture
        self.documents = Documents(lengths, device)
        self.lengths = torch.tensor(lengths, device=device)
        shape = (a.num_layers, len(lengths), a.num_kv_heads, capacity, a.head_dim)
        dtype = model.norm.weight.dtype
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._decoding = False

    def next_positions(self) -> Tensor:
        """Position of each sequence's next token, [sequences]; makes room for it."""
        self._decoding = True
        self.lengths += 1
        return self.lengths - 1

    def keep(self, rows: list[int]) -> None:
        """Drop the sequences that have ended."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths, self.keys, self.values = self.lengths[index], self.keys[:, index], self.values[:, index]

    def __call__(self, layer: int, qkv: Tensor, shape: AttentionShape, window: int | None) -> Tensor:
        q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        if not self._decoding:
            sequence = torch.repeat_interleave(torch.arange(len(self.lengths), device=q.device), self.lengths)
            self.keys[layer][sequence, :, self.documents.positions] = k
            self.values[layer][sequence, :, self.documents.positions] = v
            return self.documents(layer, qkv, shape, window)
        rows = torch.arange(len(q), device=q.device)
        self.keys[layer][rows, :, self.lengths - 1] = k
        self.values[layer][rows, :, self.lengths - 1] = v
        longest = int(self.lengths.max())
        keys, values = self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest]
        grouped = q.view(len(q), shape.kv_heads, -1, shape.head_dim)  # heads that share a key stand together
        scores = (grouped @ keys.transpose(2, 3)).float() * shape.scale
        if shape.softcap:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        key = torch.arange(longest, device=q.device)
        hidden = key >= self.lengths[:, None]
        if window is not None:
            hidden = hidden | (key < self.lengths[:, None] - window)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        return (scores.softmax(-1).to(q.dtype) @ values).reshape(len(q), -1)


def _one_by_one(
    model: PlainDecoder,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    end: frozenset[int],
    progress: Callable[[int], None],
) -> list[list[int]]:
    """By transformers' own generation, one prompt at a time."""
    answers = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt.ids)])
        with model.using(prompt.slot):
            out = model.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(end),
                pad_token_id=min(end),
            )[0, ids.shape[1] :].tolist()
        stop = next((n for n, token in enumerate(out) if token in end), len(out))
        answers.append(out[:stop])
        progress(number + 1)
    return answers
