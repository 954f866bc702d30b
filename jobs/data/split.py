"""Which rows are kept for validation: decided by each row's own content, so that it is stable when rows come and go."""

from __future__ import annotations

import numpy as np


def in_validation(digests: np.ndarray, fraction: float, kept: np.ndarray | None = None) -> np.ndarray:
    """Whether each row is for validation.

    A row goes there if its digest, as a number, lies in the lowest `fraction` of all digests. So equal rows stay
    together, neither order nor the other rows matter, and a larger fraction only adds rows. If chance leaves one side
    empty, the row with the lowest (or highest) digest changes sides; if all rows are equal, all are for training.

    Args:
        digests: uint64[rows], the first eight bytes of each row's SHA-256.
        fraction: 0..1; 0 keeps none.
        kept: bool[rows], rows that can be trained on; only these count when a side is said to be empty.

    Returns:
        bool[rows]
    """
    kept = np.ones(len(digests), bool) if kept is None else kept
    distinct = np.unique(digests[kept])
    if fraction == 0 or len(distinct) < 2:
        return np.zeros(len(digests), bool)
    threshold = int(fraction * 2**64)
    chosen = digests < np.uint64(threshold) if threshold < 2**64 else np.ones(len(digests), bool)
    if not chosen[kept].any():
        chosen |= digests == distinct[0]
    elif chosen[kept].all():
        chosen &= digests != distinct[-1]
    return chosen
