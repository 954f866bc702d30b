"""The first rows through the model's own template and tokenizer, before there is a job: what it would refuse, it refuses of
these already."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path

from jobs.data.checking import as_list, reference_rows
from jobs.data.formats import conversations
from jobs.data.render import Renderer
from jobs.data.sources import is_remote
from jobs.data.tokenise import fitting, nothing_left
from orchestrator.modeling.prompts import load_tokenizer
from orchestrator.spec.job import DataSpec

ROWS = 64
"""Enough to tell a template or a length that suits no row, and tokenised in a fraction of a second."""


def try_rows(spec: DataSpec, model: Path, *, max_length: int, base_dir: Path, cache: Path) -> list[str]:
    """
    Args:
        model: the base model's directory.

    Returns:
        What is doubtful, in sentences: no row fits, and there are more than were looked at.

    Raises:
        DataError, ModelError: what the job would say of these rows.
    """
    references = as_list(spec.train)
    if any(is_remote(reference) and not reference.startswith("example:") for reference in references):
        return []  # only the job may reach them
    source = chain.from_iterable(reference_rows(reference, base_dir, cache) for reference in references)
    read = [row.with_system(spec.system) for row, _ in islice(conversations(source, spec.format), ROWS + 1)]
    rows = read[: min(ROWS, spec.limit or ROWS)]
    examples = Renderer(load_tokenizer(model)).tokens(rows)
    usable = [
        fitting(row, those, spec, max_length) for row, those in zip(rows, examples, strict=True)
    ]  # each is looked at
    if any(usable):
        return []
    longest, names = max(len(one.ids) for those in examples for one in those), ", ".join(references)
    if len(rows) < ROWS or len(read) == ROWS:  # these are all
        raise nothing_left(names, longest, spec, max_length)
    return [str(nothing_left(f"the first {ROWS} of {names}", longest, spec, max_length))]
