"""What a person learns about their data: formats, counts, lengths."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel


class SplitReport(BaseModel):
    """One of train, validation and test."""

    format: str
    rows: int
    """Rows read."""
    duplicates: int = 0
    """Rows that repeat an earlier one of this split."""
    in_train: int = 0
    """Rows that training sees too: a score on them says nothing."""
    examples: int = 0
    """Token sequences kept: one a row, or one an answer where the template rewrites earlier turns."""
    dropped: int = 0
    """Examples left out for their length."""
    truncated: int = 0
    """Examples cut to the longest length allowed."""
    tokens: int = 0
    labelled_tokens: int = 0
    """Tokens that carry loss."""
    max_length: int = 0
    """Tokens."""
    mean_length: float = 0.0
    p95_length: float = 0.0

    def with_lengths(self, lengths: np.ndarray, labelled: np.ndarray) -> SplitReport:
        if not len(lengths):
            return self
        return self.model_copy(
            update={
                "examples": len(lengths),
                "tokens": int(lengths.sum(dtype=np.int64)),
                "labelled_tokens": int(labelled.sum(dtype=np.int64)),
                "max_length": int(lengths.max()),
                "mean_length": round(float(lengths.mean()), 1),
                "p95_length": round(float(np.percentile(lengths, 95)), 1),
            }
        )


class DataReport(BaseModel):
    format: str
    """Of the training rows."""
    train: SplitReport
    validation: SplitReport | None = None
    test: SplitReport | None = None
    sources: dict[str, str] = {}
    """Source → `sha256:…` of its bytes; for what is read remotely, of its rows in order."""
    unchecked: list[str] = []
    """Remote sources that only the job will read."""

    def warnings(self) -> list[str]:
        """What is no mistake, and hardly what anybody wants."""
        found = []
        for name, part in (("validation", self.validation), ("test", self.test)):
            if part and part.in_train:
                found.append(f"{part.in_train:,} {name} rows are training rows too; a score on them says nothing.")
        if self.validation and 0 < self.train.rows < self.validation.rows:
            found.append(
                f"{self.train.rows:,} rows are for training and {self.validation.rows:,} for validation: a smaller "
                "data.validation leaves more to learn from."
            )
        return found


def count_rows(format: str, digests: np.ndarray, trained: np.ndarray | None = None) -> SplitReport:
    """Rows, duplicates, and those that are also in `trained` (digests too), before anything is tokenised."""
    return SplitReport(
        format=format,
        rows=len(digests),
        duplicates=len(digests) - len(np.unique(digests)),
        in_train=0 if trained is None else int(np.isin(digests, trained).sum()),
    )
