"""What was trained beside the base model, on rows that neither has seen: with an adapter, all of them in one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.data import PreparedData, TestRow, example_rows
from jobs.evaluate import BASE, Candidate, Shown, answer, compare, with_examples
from jobs.train.artifact import PUBLISHED
from jobs.train.session import Session
from jobs.train.setup import load_network
from orchestrator.errors import DataError, StoreError
from orchestrator.modeling.base_model import BaseModel
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.model_files import read_config
from orchestrator.modeling.plain import PlainDecoder
from orchestrator.runs.result import EvaluationResult
from orchestrator.spec.job import FullTuning


def evaluate(
    session: Session,
    published: Decoder | PlainDecoder,
    artifact: Path,
    base: BaseModel,
    tokenizer: Any,
    data: PreparedData,
) -> EvaluationResult:
    """
    Args:
        published: a network that holds what the files in `artifact` say.
    """
    spec = session.spec.evaluate
    assert spec is not None
    rows = data.test[: spec.rows]
    with session.phase("evaluating"):
        shown = _few_shot(session, base, tokenizer, data, rows)
        bases = [BASE, Candidate(rows=shown.rows)] if shown else [BASE]

        def progress(offset: int) -> Callable[[int], None]:
            total = (len(bases) + 1) * len(rows)
            return lambda done: session.say("progress", phase="evaluating", done=offset + done, total=total)

        progress(0)(0)
        if isinstance(session.spec.tuning, FullTuning):
            before = answer(fresh(session, base), tokenizer, rows, bases, spec.max_new_tokens, progress(0))
            later = progress(len(bases) * len(rows))
            (after,) = answer(published, tokenizer, rows, [BASE], spec.max_new_tokens, later)
        else:
            candidates = [*bases, Candidate(PUBLISHED, artifact)]
            *before, after = answer(published, tokenizer, rows, candidates, spec.max_new_tokens, progress(0))
    if shown is None:
        return compare(spec, rows, before[0], after)
    return compare(spec, rows, before[0], after, few_shot=before[1], examples=shown.mean)


def fresh(session: Session, base: BaseModel) -> Decoder | PlainDecoder:
    """The base as it was, whole, on this rank alone."""
    return load_network(session.spec, base, session.place, whole=True).eval()


def _few_shot(
    session: Session, base: BaseModel, tokenizer: Any, data: PreparedData, rows: list[TestRow]
) -> Shown | None:
    """None where the spec asks for no examples, or none can be shown. That is said, and no reason to lose what was trained."""
    spec = session.spec
    assert spec.evaluate is not None
    if spec.evaluate.baseline is None:
        return None
    asked, why = spec.evaluate.baseline.few_shot, "no training row can stand before a question"
    places: dict[str, Any] = {"store": session.store, "cache": session.cache}
    try:
        examples = example_rows(session.resolved.data, spec.data, data, most=asked, seed=spec.train.seed, **places)
    except (DataError, StoreError) as error:
        examples, why = [], error.message.rstrip(".")
    longest = _context(base) - spec.evaluate.max_new_tokens
    shown = with_examples(tokenizer, rows, examples, longest)
    if not any(shown.counts):
        if examples:
            why = f"with one example, no question fits into {longest:,} tokens and pleases the chat template"
        session.say("message", f"There is no few-shot baseline: {why}.", level="warn")
        return None
    if fewer := sum(count < asked for count in shown.counts):
        why = "there are no more" if len(examples) < asked else f"more do not fit into {longest:,} tokens"
        words = f"{fewer} of {len(rows)} test rows have fewer than {asked} examples before them ({shown.mean:g} on average): {why}."
        session.say("message", words, level="warn")
    return shown


def _context(base: BaseModel) -> int:
    """Most tokens that the model was made for; of one that does not say, what serving allows."""
    return int(read_config(base.path, base.reference).get("max_position_embeddings") or 4096)
