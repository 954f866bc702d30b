"""Measures a model on rows it never saw: answers are generated greedily and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jobs.data import TestRow
from jobs.data.render import Renderer
from jobs.evaluate.metrics import score
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.generate import Prompt, generate
from orchestrator.modeling.plain import PlainDecoder
from orchestrator.runs.result import AnswerSample, EvaluationResult
from orchestrator.spec.job import EvaluateSpec

_SAMPLES = 10


def answer(
    model: Decoder | PlainDecoder,
    tokenizer: Any,
    rows: Sequence[TestRow],
    slots: Sequence[str | None],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[str]]:
    """Answers to every row by each of `slots`, in one batch where the model can: one list of texts for each slot."""
    renderer = Renderer(tokenizer)
    ids = [tokenizer(renderer.prompt(row.messages, row.tools), add_special_tokens=False)["input_ids"] for row in rows]
    prompts = [Prompt(prompt, slot) for slot in slots for prompt in ids]
    end = end_tokens(tokenizer)
    out = generate(model, prompts, max_new_tokens=max_new_tokens, end=end, progress=progress)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    return [texts[n * len(rows) : (n + 1) * len(rows)] for n in range(len(slots))]


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """What ends a turn: the tokenizer's end of sequence and the template's end of turn."""
    names = [tokenizer.eos_token, "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]
    vocabulary = tokenizer.get_vocab()
    found = {vocabulary[name] for name in names if name in vocabulary}
    return frozenset(found) or frozenset({0})


def compare(spec: EvaluateSpec, rows: Sequence[TestRow], before: list[str], after: list[str]) -> EvaluationResult:
    """Score both models' answers and keep a few side by side."""
    expected = [row.answer for row in rows]
    samples = [
        AnswerSample(prompt=str(row.messages[-1].get("content") or ""), expected=row.answer, before=b, after=a)
        for row, b, a in zip(rows[:_SAMPLES], before, after, strict=False)
    ]
    return EvaluationResult(
        rows=len(rows),
        before=score(spec.metrics, expected, before),
        after=score(spec.metrics, expected, after),
        samples=samples,
    )
