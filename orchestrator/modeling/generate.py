"""Greedy answers by the plain path, one prompt at a time: for the architectures that the serving engine does not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from orchestrator.modeling.plain import PlainDecoder


@dataclass(frozen=True)
class Prompt:
    ids: Sequence[int]
    slot: str | None = None


@torch.no_grad()
def generate(
    model: PlainDecoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    end: frozenset[int],
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Continue each prompt, by transformers' own generation, until an end token or the limit; the end token is left out.

    Args:
        progress: told how many prompts are answered.
    """
    model.eval()
    answers = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([list(prompt.ids)], device=model.model.device)
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
