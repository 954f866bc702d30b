"""Answers of a model to rows that it never saw, by the engine that will serve it: what is evaluated is what is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.data import TestRow
from jobs.data.render import Renderer
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.generate import Prompt, generate
from orchestrator.modeling.prompts import end_tokens, prompt_ids
from serving.engine.core import EngineCore, answers
from serving.engine.network import ServedNetwork
from serving.engine.protocol import GenerateRequest, Sampling
from serving.engine.scheduler import Limits


@dataclass(frozen=True)
class Candidate:
    """Who answers: the base alone, or with an adapter."""

    slot: str | None = None
    """The adapter's slot in the model: what the plain path uses."""
    directory: Path | None = None
    """The adapter's files: what the engine loads, as it does when serving."""
    rows: Sequence[TestRow] | None = None
    """What it is asked where that differs from what all are: the same rows with examples before them."""


BASE = Candidate()


def answer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TestRow],
    candidates: Sequence[Candidate],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[str]]:
    """Greedy answers of every candidate to every row, together where the model can: one list of texts a candidate.

    Args:
        progress: told how many answers there are.
    """
    renderer = Renderer(tokenizer)

    def prompts(asked: Sequence[TestRow]) -> list[list[int]]:
        return [prompt_ids(tokenizer, renderer.prompt(row.messages, row.tools)) for row in asked]

    if not rows:
        return [[] for _ in candidates]
    shared = prompts(rows)
    asked = [
        (prompt, candidate)
        for candidate in candidates
        for prompt in (shared if candidate.rows is None else prompts(candidate.rows))
    ]
    end = end_tokens(tokenizer)
    if isinstance(model, Decoder):
        texts = _by_engine(model, tokenizer, asked, end, max_new_tokens, progress)
    else:
        plain = [Prompt(prompt, candidate.slot) for prompt, candidate in asked]
        out = generate(model, plain, max_new_tokens=max_new_tokens, end=end, progress=progress)
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    return [texts[n * len(rows) : (n + 1) * len(rows)] for n in range(len(candidates))]


_AT_ONCE = 64  # answers decoded together; more gain little on a CPU


def _by_engine(
    model: Decoder,
    tokenizer: Any,
    asked: Sequence[tuple[list[int], Candidate]],
    end: frozenset[int],
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> list[str]:
    longest = max(len(prompt) for prompt, _ in asked) + max_new_tokens
    network = ServedNetwork(model)
    room = network.cache_tokens(share=0.25)
    limits = Limits(
        cache_tokens=max(longest, min(_AT_ONCE * longest, room)), max_sequences=_AT_ONCE, max_length=longest
    )
    core = EngineCore(network, tokenizer, end, limits)
    for directory in {candidate.directory for _, candidate in asked if candidate.directory}:
        core.load(str(directory), directory)
    texts: dict[str, str] = {}
    for number, (prompt, candidate) in enumerate(asked):
        adapter = str(candidate.directory) if candidate.directory else None
        core.add(GenerateRequest(tuple(prompt), adapter, Sampling(max_tokens=max_new_tokens), id=str(number)))
        texts[str(number)] = ""
    done = 0
    for delivery in answers(core):
        if delivery.error is not None:
            raise delivery.error
        assert delivery.event is not None
        texts[delivery.request_id] += delivery.event.text
        if delivery.last:
            done += 1
            progress(done)
    return list(texts.values())
