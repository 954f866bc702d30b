"""Which micro-batches go together. 2 seconds."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as some

from jobs.sweep.passes import joint_passes
from jobs.sweep.teams import apart


def part(lane: int, place: int, tokens: int) -> Any:
    return SimpleNamespace(lane=lane, place=place, tokens=tokens)


def passes(lanes: list[list[int]], tokens: int, most: int | None = None) -> list[list[Any]]:
    coming: Any = [[partial(part, n, place, size) for place, size in enumerate(sizes)] for n, sizes in enumerate(lanes)]
    return list(joint_passes(coming, tokens, most))


@given(some.lists(some.lists(some.integers(1, 60), max_size=5), max_size=6), some.integers(1, 100))
def test_each_goes_once_in_its_lanes_order_and_none_too_large_goes_together(
    lanes: list[list[int]], tokens: int
) -> None:
    found = passes(lanes, tokens)
    for lane, sizes in enumerate(lanes):
        assert [one.place for together in found for one in together if one.lane == lane] == list(range(len(sizes)))
    for together in found:
        numbers = [one.lane for one in together]
        assert numbers == sorted(set(numbers))  # one of a lane, so that its gradients add up in its own order
        assert len(together) == 1 or sum(one.tokens for one in together) <= tokens


def test_a_lane_with_much_to_come_is_not_left_alone() -> None:
    found = passes([[50], [50], [50], [40, 40, 40]], 100)
    assert [[one.lane for one in together] for together in found] == [[0, 3], [1, 3], [2, 3]]


def test_small_ones_fill_what_large_ones_leave() -> None:
    assert [len(together) for together in passes([[70], [30], [60], [40]], 100)] == [2, 2]


def test_no_more_lanes_go_together_than_are_asked_for() -> None:
    assert [len(together) for together in passes([[10]] * 5, 100, 2)] == [2, 2, 1]


def test_nothing_is_packed_before_its_turn() -> None:
    made: list[int] = []

    def make(number: int) -> Any:
        made.append(number)
        return part(0, number, 10)

    coming: Any = joint_passes([[partial(make, number) for number in range(3)]], 100)
    next(coming)
    assert made == [0]


@given(some.lists(some.lists(some.integers(1, 60), max_size=5), max_size=6), some.integers(1, 100))
def test_passes_that_are_computed_beside_each_other_have_no_lane_in_common(lanes: list[list[int]], tokens: int) -> None:
    one_by_one = passes(lanes, tokens)
    found = list(apart(one_by_one))
    assert [parts for several in found for parts in several] == one_by_one
    for several in found:
        taken = [part.lane for parts in several for part in parts]
        assert len(taken) == len(set(taken))
    for several, following in itertools.pairwise(found):
        assert {p.lane for parts in several for p in parts} & {p.lane for p in following[0]}, (
            "it could have been beside them"
        )
