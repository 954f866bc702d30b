"""Which configurations a search space has, and which of them are tried."""

from __future__ import annotations

import itertools
import math

import pytest
from pydantic import TypeAdapter, ValidationError

from orchestrator.spec.search import (
    Choice,
    Grid,
    LogUniform,
    RandInt,
    SearchSpace,
    Uniform,
    at_random,
    combinations,
    in_order,
)

SPACE = TypeAdapter(SearchSpace)


def space(**ranges: dict[str, list[object]]) -> SearchSpace:
    return SPACE.validate_python(ranges)


def drawn(one: SearchSpace, count: int, seed: int = 0) -> list[dict[str, object]]:
    return list(itertools.islice(at_random(one, seed), count))


def test_each_range_is_known_by_its_only_key_and_survives_json():
    found = space(
        a={"loguniform": [1e-5, 1e-3]},
        b={"uniform": [0, 1]},
        c={"randint": [1, 3]},
        d={"choice": [1]},
        e={"grid": ["x"]},
    )
    assert [type(one) for one in found.values()] == [LogUniform, Uniform, RandInt, Choice, Grid]
    assert SPACE.validate_json(SPACE.dump_json(found)) == found
    assert SPACE.validate_python(found) == found


def test_a_choice_keeps_the_kind_of_each_value():
    values = [True, 1, 1.5, "all-linear", ["q_proj"], None]
    [one] = space(a={"choice": [2, *values[2:]]}).values()
    assert isinstance(one, Choice)
    assert [type(value) for value in one.choice] == [int, float, str, list, type(None)]
    [both] = space(a={"choice": [True, False]}).values()
    assert both.ends == [True, False]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"a": {}},
        {"a": {"choice": [1], "grid": [1]}},
        {"a": {"nearby": [1, 2]}},
        {"a": [1, 2]},
        {"a": {"choice": []}},
        {"a": {"choice": [1, 2, 1]}},
        {"a": {"choice": [{"b": 1}]}},
        {"a": {"randint": [2, 2]}},
        {"a": {"randint": [1, 2.5]}},
        {"a": {"uniform": [2, 1]}},
        {"a": {"uniform": [1, 2, 3]}},
        {"a": {"uniform": [0, float("inf")]}},
        {"a": {"uniform": [False, True]}},
        {"a": {"loguniform": [0, 1]}},
        {"a": {"loguniform": [-1, 1]}},
    ],
)
def test_what_is_no_range_is_refused(given: dict[str, object]):
    with pytest.raises(ValidationError):
        SPACE.validate_python(given)


def test_combinations_are_counted_and_the_last_field_changes_fastest():
    one = space(a={"choice": ["x", "y"]}, b={"randint": [1, 3]})
    assert combinations(one) == 6
    assert [(config["a"], config["b"]) for config in in_order(one)] == [
        *(("x", 1), ("x", 2), ("x", 3)),
        *(("y", 1), ("y", 2), ("y", 3)),
    ]
    assert combinations(space(a={"choice": [1]}, b={"uniform": [0, 1]})) is None


def test_a_seed_decides_what_is_drawn():
    one = space(a={"loguniform": [1e-5, 1e-2]}, b={"choice": [1, 2, 3]})
    assert drawn(one, 20, seed=3) == drawn(one, 20, seed=3)
    assert drawn(one, 20, seed=3) != drawn(one, 20, seed=4)
    assert drawn(one, 5, seed=3) == drawn(one, 20, seed=3)[:5], "asking for more does not change the first ones"


def test_a_finite_space_is_drawn_whole_without_repetition():
    one = space(a={"choice": ["x", "y"]}, b={"randint": [1, 5]}, c={"grid": [0.1, 0.2]})
    found = drawn(one, 1000)
    assert len(found) == 20
    assert sorted(map(str, found)) == sorted(map(str, in_order(one)))
    assert found != list(in_order(one))


def test_a_grid_is_dealt_out_evenly():
    one = space(a={"loguniform": [1e-5, 1e-3]}, rank={"grid": [4, 8, 16]})
    assert [config["rank"] for config in drawn(one, 7)] == [4, 8, 16, 4, 8, 16, 4]


def test_what_is_given_first_comes_first_and_once():
    one = space(a={"choice": [1, 2, 3]}, b={"choice": [1, 2]})
    first = [{"a": 3, "b": 1}, {"a": 3, "b": 1}, {"a": 2, "b": 2}]
    found = list(at_random(one, 0, first))
    assert found[:2] == [first[0], first[2]]
    assert len(found) == len({str(config) for config in found}) == 6


def test_a_logarithmic_range_draws_each_factor_as_often():
    values = [config["a"] for config in drawn(space(a={"loguniform": [1e-6, 1e-2]}), 400)]
    assert all(1e-6 <= value <= 1e-2 for value in values)
    decades = [math.floor(math.log10(value)) for value in values]
    assert all(70 <= decades.count(decade) <= 130 for decade in (-6, -5, -4, -3))
    assert all(float(f"{value:.4g}") == value for value in values)


def test_both_ends_of_a_range_of_whole_numbers_are_drawn():
    assert {config["a"] for config in drawn(space(a={"randint": [4, 6]}), 3)} == {4, 5, 6}


@pytest.mark.parametrize("seed", range(5))
def test_a_range_so_large_that_it_cannot_be_listed_is_drawn_at_once(seed: int):
    one = space(seed={"randint": [0, 2**31]}, b={"randint": [0, 10**9]})
    found = drawn(one, 50, seed)
    assert len({str(config) for config in found}) == 50


def test_a_range_that_holds_few_numbers_ends():
    narrow = space(a={"uniform": [1.0, math.nextafter(math.nextafter(1.0, 2), 2)]})
    values = [config["a"] for config in drawn(narrow, 50)]
    assert 1 <= len(values) == len(set(values)) <= 3
    close = [config["a"] for config in drawn(space(a={"uniform": [0.1, 0.1000001]}), 20)]
    assert len(set(close)) == 20
