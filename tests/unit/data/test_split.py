"""The validation split is stable. About two seconds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.split import in_validation

DIGESTS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60).map(lambda values: np.array(values, np.uint64))
FRACTIONS = st.floats(0.0, 1.0)


@given(DIGESTS, FRACTIONS)
def test_both_sides_have_a_row_unless_all_are_equal(digests: np.ndarray, fraction: float) -> None:
    held_out = in_validation(digests, fraction)
    assert not held_out.all()
    assert held_out.any() == (fraction > 0 and len(np.unique(digests)) > 1)


@given(DIGESTS, FRACTIONS)
def test_equal_rows_stay_together(digests: np.ndarray, fraction: float) -> None:
    twice = in_validation(np.concatenate([digests, digests]), fraction)
    assert (twice[: len(digests)] == twice[len(digests) :]).all()
    assert (twice[: len(digests)] == in_validation(digests, fraction)).all()


@given(DIGESTS, FRACTIONS, st.randoms())
def test_order_does_not_matter(digests: np.ndarray, fraction: float, random: object) -> None:
    order = np.array(sorted(range(len(digests)), key=lambda _: random.random()))  # type: ignore[attr-defined]
    assert (in_validation(digests[order], fraction) == in_validation(digests, fraction)[order]).all()


def test_rows_that_come_later_move_none() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 2000, np.uint64, endpoint=False)
    before, after = in_validation(digests[:1000], 0.1), in_validation(digests, 0.1)
    assert (before == after[:1000]).all()
    assert 70 < before.sum() < 130
    assert (in_validation(digests, 0.2) | ~after).all()  # a larger share only adds


def test_only_rows_that_are_kept_count_as_a_side() -> None:
    digests = np.array([1, 2**63, 2**64 - 1], np.uint64)  # the first alone is below a tenth
    held_out = in_validation(digests, 0.1, kept=np.array([False, True, True]))
    assert held_out.tolist() == [True, True, False]
