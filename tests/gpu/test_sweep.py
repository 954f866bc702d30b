"""Lanes on a GPU are each their own run, and none disturbs another."""

from __future__ import annotations

from tests.unit.sweep.test_packed import (
    test_a_trial_that_diverges_dies_alone,
    test_a_trunks_branch_is_its_own_run,
    test_bfloat16_stays_within_its_own_rounding,
    test_trials_side_by_side_are_each_their_own_run,
    test_what_goes_alone_is_its_own_run_to_the_last_bit,
)
from tests.unit.sweep.test_packed_snapshots import test_a_group_goes_on_from_a_snapshot_to_the_last_digit

__all__ = [
    "test_a_group_goes_on_from_a_snapshot_to_the_last_digit",
    "test_a_trial_that_diverges_dies_alone",
    "test_a_trunks_branch_is_its_own_run",
    "test_bfloat16_stays_within_its_own_rounding",
    "test_trials_side_by_side_are_each_their_own_run",
    "test_what_goes_alone_is_its_own_run_to_the_last_bit",
]
