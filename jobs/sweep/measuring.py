"""What a sweep by an evaluation metric is decided by: each finished trial's answers to the validation rows, scored.

They are given when the trial finishes, those of trials that finish at the same step together, and not all at the sweep's end. One
adapter's rows fill the engine's batch already, so waiting gains next to nothing; and so what is kept of a trial, and is told Ray Tune
as its last report, has the metric in it: Optuna draws later trials by it, and neither a killed group nor a resumed sweep can lose it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.data import PreparedData, TestRow, validation_rows
from jobs.evaluate import Candidate, answer
from jobs.evaluate.metrics import score
from jobs.train.session import Session
from jobs.train.setup import give_back_freed_memory
from orchestrator.errors import AdaptoryError, DataError

MOST_ROWS = 500
"""That each trial answers where `evaluate.rows` says nothing: of so many, a share has a standard error of two hundredths."""
AT_ONCE = 32
"""Adapters that the engine holds at a time."""
BEAT_SECONDS = 60.0
"""After which ranks that wait hear that rank 0 still answers: a collective that nobody joins for half an hour ends the group."""

Measured = dict[str, Any]
"""What a trial's last report gets: `metrics`, or the `message` that says why there are none."""


def _with_adapter(directory: Path) -> Candidate:
    return Candidate(directory=directory)


class Measure:
    """
    Args:
        network: that the trials are trained on; it is left as it was.
        rows: to answer; rank 0 has them.
        candidate: who answers for a trial with these files.
    """

    def __init__(
        self,
        session: Session,
        network: Any,
        tokenizer: Any,
        rows: Sequence[TestRow],
        candidate: Callable[[Path], Candidate] = _with_adapter,
    ):
        self._session, self._network, self._tokenizer, self._rows = session, network, tokenizer, rows
        self._candidate = candidate
        self._beat_at = 0.0

    def __call__(self, adapters: Mapping[str, Path]) -> dict[str, Measured]:
        """By trial. Every rank calls it with the same trials; rank 0 answers, and the others wait for what comes of it.

        Args:
            adapters: the files of each trial's adapter, which rank 0 has.
        """
        measured: dict[str, Measured] = {}
        trials = list(adapters)
        with self._session.phase("evaluating"):
            for start in range(0, len(trials), AT_ONCE):
                some = {trial: adapters[trial] for trial in trials[start : start + AT_ONCE]}
                measured |= self._told(some)
        return measured

    def _told(self, adapters: Mapping[str, Path]) -> dict[str, Measured]:
        place = self._session.place
        if place.rank == 0:
            self._beat_at = time.monotonic()
            return place.told(self._scores(adapters))
        while (found := place.told(None)) is None:
            continue
        return found

    def _beat(self) -> None:
        if time.monotonic() - self._beat_at >= BEAT_SECONDS:
            self._session.place.told(None)
            self._beat_at = time.monotonic()

    def _scores(self, adapters: Mapping[str, Path]) -> dict[str, Measured]:
        """Of all in one batch; where that fails, of each alone, so that one of them costs no other its metric."""
        give_back_freed_memory()
        try:
            return self._together(adapters)
        except AdaptoryError as error:
            if len(adapters) > 1:
                return {trial: self._scores({trial: path})[trial] for trial, path in adapters.items()}
            [trial] = adapters
            self._session.say("message", f"A finished trial could not be evaluated: {error}", level="warn")
            return {trial: {"message": f"could not be evaluated: {error.message}"}}

    def _together(self, adapters: Mapping[str, Path]) -> dict[str, Measured]:
        spec, rows = self._session.spec.evaluate, self._rows
        assert spec is not None
        total = len(adapters) * len(rows)

        def progress(done: int) -> None:
            self._session.say("progress", phase="evaluating", done=done, total=total)
            self._beat()

        candidates = [self._candidate(path) for path in adapters.values()]
        answers = answer(self._network, self._tokenizer, rows, candidates, spec.max_new_tokens, progress)
        expected = [row.answer for row in rows]
        scores = [score(spec.metrics, expected, given) for given in answers]
        return {trial: {"metrics": found} for trial, found in zip(adapters, scores, strict=True)}


def measure_of(session: Session, network: Any, tokenizer: Any, data: PreparedData) -> Measure | None:
    """None where the sweep is decided by the validation loss, which trials report as they train.

    Raises:
        DataError: no validation row asks anything.
    """
    spec = session.spec
    assert spec.sweep is not None
    if spec.sweep.metric == "validation_loss":
        return None
    rows: list[TestRow] = []
    if session.place.rank == 0:
        rows = rows_to_answer(session, data)
        session.say(
            "message",
            f"Trials are compared by {spec.sweep.metric} on {len(rows)} validation rows; evaluate.rows says how many.",
            rows=len(rows),
        )
    return Measure(session, network, tokenizer, rows)


def rows_to_answer(session: Session, data: PreparedData) -> list[TestRow]:
    """What decides a sweep by an evaluation metric.

    Raises:
        DataError: no validation row asks anything.
    """
    spec = session.spec
    assert spec.sweep is not None
    assert spec.evaluate is not None
    most = spec.evaluate.rows or MOST_ROWS
    rows = validation_rows(session.resolved.data, spec.data, data, most=most, store=session.store, cache=session.cache)
    if not rows:
        raise DataError(
            f"The sweep is decided by {spec.sweep.metric} on the validation rows, and none of them has a question and an answer.",
            hint="Set data.validation to a file of such rows, or to a larger fraction; or sweep.metric to validation_loss.",
            value=spec.sweep.metric,
        )
    return rows
