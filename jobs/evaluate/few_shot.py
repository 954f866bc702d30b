"""Questions with worked examples before them: what the base model can do when it is shown the task instead of trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import jinja2

from jobs.data import TestRow
from jobs.data.formats import Message
from jobs.data.render import Renderer
from orchestrator.modeling.prompts import prompt_ids


@dataclass(frozen=True)
class Shown:
    rows: list[TestRow]
    counts: list[int]
    """Examples before each."""

    @property
    def mean(self) -> float:
        return round(sum(self.counts) / max(1, len(self.counts)), 2)


def with_examples(tokenizer: Any, rows: Sequence[TestRow], examples: Sequence[list[Message]], longest: int) -> Shown:
    """Each row with the examples between its system message and its own turns, as many as its prompt has room for.

    Args:
        examples: turns without a system message; the first ones stay where not all fit.
        longest: most tokens of a prompt.

    Returns:
        A row has no example where not one fits, or where the model's chat template refuses them.
    """
    renderer = Renderer(tokenizer)
    asked, counts = [], []
    for row in rows:
        for count in range(len(examples), 0, -1):
            shown = _shown(row, examples[:count])
            if _fits(renderer, shown, longest):
                break
        else:
            shown, count = row, 0
        asked.append(shown)
        counts.append(count)
    return Shown(asked, counts)


def _shown(row: TestRow, examples: Sequence[list[Message]]) -> TestRow:
    system = [message for message in row.messages[:1] if message["role"] == "system"]
    return replace(row, messages=[*system, *chain.from_iterable(examples), *row.messages[len(system) :]])


def _fits(renderer: Renderer, row: TestRow, longest: int) -> bool:
    try:
        return len(prompt_ids(renderer.tokenizer, renderer.prompt(row.messages, row.tools))) <= longest
    except (jinja2.TemplateError, TypeError, ValueError):
        return False
