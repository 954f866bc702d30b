"""Search spaces: ranges of values, how many configurations they have, and which ones are tried, decided by a seed alone.

Only the standard library: its generator gives the same numbers in every version, and Ray Tune's search spaces are made from
these ranges where Ray is.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.spec.base import SpecModel

Value = bool | int | float | str | list[str] | None
"""What a searched field may hold."""

Config = dict[str, Any]
"""One configuration: a field's full name (`train.learning_rate`) → its value."""


# --- ranges ---------------------------------------------------------------------------------------------------------


class _Range(SpecModel):
    @property
    def count(self) -> int | None:
        """How many values it has; None when there is no end of them."""
        return None

    @property
    def ends(self) -> list[Any]:
        """The values that decide whether a field can take them all."""
        raise NotImplementedError

    @property
    def middle(self) -> Any:
        """A value that is as good as any."""
        raise NotImplementedError

    def draw(self, generator: random.Random) -> Any:
        raise NotImplementedError

    def at(self, index: int) -> Any:
        """The value at `index`, of a range that has a `count`."""
        raise NotImplementedError

    def holds(self, value: Any) -> bool:
        raise NotImplementedError


class _Interval(_Range):
    @property
    def low(self) -> float:
        return self.ends[0]

    @property
    def high(self) -> float:
        return self.ends[1]

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


class LogUniform(_Interval):
    loguniform: tuple[float, float]
    """Between both, so that each factor is as likely as another: for learning rates."""

    @field_validator("loguniform")
    @classmethod
    def _some(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if min(ends) <= 0:
            words = f"goes from {ends[0]:g} to {ends[1]:g}: a logarithmic range through zero has no beginning"
            raise _refused(words, "Begin above zero, for instance at 1.0e-5, or use uniform.")
        return _ascending(ends)

    @property
    def ends(self) -> list[float]:
        return list(self.loguniform)

    @property
    def middle(self) -> float:
        return _short(math.sqrt(self.low * self.high), self)

    def draw(self, generator: random.Random) -> float:
        return _short(math.exp(generator.uniform(math.log(self.low), math.log(self.high))), self)


class Uniform(_Interval):
    uniform: tuple[float, float]
    """Between both, each value as likely as another."""

    @field_validator("uniform")
    @classmethod
    def _some(cls, ends: tuple[float, float]) -> tuple[float, float]:
        return _ascending(ends)

    @property
    def ends(self) -> list[float]:
        return list(self.uniform)

    @property
    def middle(self) -> float:
        return _short((self.low + self.high) / 2, self)

    def draw(self, generator: random.Random) -> float:
        return _short(generator.uniform(self.low, self.high), self)


class RandInt(_Interval):
    randint: tuple[int, int]
    """A whole number between both; both may be drawn."""

    @field_validator("randint")
    @classmethod
    def _some(cls, ends: tuple[int, int]) -> tuple[int, int]:
        return _ascending(ends)

    @property
    def count(self) -> int:
        return self.randint[1] - self.randint[0] + 1

    @property
    def ends(self) -> list[int]:
        return list(self.randint)

    @property
    def middle(self) -> int:
        return sum(self.randint) // 2

    def draw(self, generator: random.Random) -> int:
        return generator.randint(*self.randint)

    def at(self, index: int) -> int:
        return self.randint[0] + index

    def holds(self, value: Any) -> bool:
        return super().holds(value) and value == int(value)


class _Listed(_Range):
    @property
    def values(self) -> list[Any]:
        raise NotImplementedError

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def ends(self) -> list[Any]:
        return self.values

    @property
    def middle(self) -> Any:
        return self.values[(len(self.values) - 1) // 2]

    def draw(self, generator: random.Random) -> Any:
        return generator.choice(self.values)

    def at(self, index: int) -> Any:
        return self.values[index]

    def holds(self, value: Any) -> bool:
        return value in self.values


class Choice(_Listed):
    choice: list[Value]
    """One of these."""

    @field_validator("choice")
    @classmethod
    def _some(cls, values: list[Any]) -> list[Any]:
        return _distinct(values)

    @property
    def values(self) -> list[Any]:
        return self.choice


class Grid(_Listed):
    grid: list[Value]
    """Each of these in turn, so that all are tried equally often; for the searcher `optuna` the same as `choice`."""

    @field_validator("grid")
    @classmethod
    def _some(cls, values: list[Any]) -> list[Any]:
        return _distinct(values)

    @property
    def values(self) -> list[Any]:
        return self.grid


KINDS: dict[str, type[_Range]] = {
    "loguniform": LogUniform,
    "uniform": Uniform,
    "randint": RandInt,
    "choice": Choice,
    "grid": Grid,
}


def _kind(value: Any) -> str | None:
    names = list(value) if isinstance(value, dict) else list(type(value).model_fields) if _is_range(value) else []
    return names[0] if len(names) == 1 and names[0] in KINDS else None


def _is_range(value: Any) -> bool:
    return isinstance(value, _Range)


SearchRange = Annotated[
    Annotated[LogUniform, Tag("loguniform")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[RandInt, Tag("randint")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Grid, Tag("grid")],
    Discriminator(
        _kind,
        custom_error_type="search_kind",
        custom_error_message="a range is one of loguniform, uniform, randint, choice or grid",
    ),
]
SearchSpace = Annotated[dict[str, SearchRange], Field(min_length=1)]


# --- configurations -------------------------------------------------------------------------------------------------


def combinations(space: Mapping[str, _Range]) -> int | None:
    """How many configurations a space has; None when a range of it is continuous."""
    counts = [one.count for one in space.values()]
    return None if None in counts else math.prod(count for count in counts if count is not None)


def in_order(space: Mapping[str, _Range]) -> Iterator[Config]:
    """Every configuration of a space that has no continuous range; the field named last changes fastest."""
    yield from (_at(space, index) for index in range(combinations(space) or 0))


def at_random(space: Mapping[str, _Range], seed: int, first: list[Config] | None = None) -> Iterator[Config]:
    """Configurations drawn by a seed, none of them twice: it ends where a space does, and never if a range is continuous.

    Args:
        first: given before all others.
    """
    generator = random.Random(seed)
    given: list[Config] = []
    fixed = {name: one for name, one in space.items() if isinstance(one, Grid)}
    free = {name: one for name, one in space.items() if name not in fixed}
    dealt, rest = combinations(fixed) or 1, combinations(free)
    most = None if rest is None else dealt * rest
    for config in first or []:
        if config not in given:
            given.append(config)
            yield config
    orders: dict[int, Iterator[Config]] = {}
    for turn in itertools.count():
        if most is not None and len(given) >= most:
            return
        place = turn % dealt
        drawn = itertools.islice(orders.setdefault(place, _drawn(free, rest, generator)), _PATIENCE)
        found: Config | None = next((each for each in drawn if _merged(space, fixed, place, each) not in given), None)
        if found is not None:
            given.append(whole := _merged(space, fixed, place, found))
            yield whole
        elif rest is None:
            return  # a range so narrow that it holds a few numbers only


_PATIENCE = 10_000
"""Draws in a row that were all given before, after which a continuous range is taken to be exhausted."""


def _drawn(free: Mapping[str, _Range], count: int | None, generator: random.Random) -> Iterator[Config]:
    if count is None:
        while True:
            yield {name: one.draw(generator) for name, one in free.items()}
    for index in _shuffled(count, generator):
        yield _at(free, index)


def _shuffled(count: int, generator: random.Random) -> Iterator[int]:
    """0 to count - 1 in a random order, holding no more of it than was asked for (Fisher and Yates, lazily)."""
    moved: dict[int, int] = {}
    for place in range(count):
        other = generator.randrange(place, count)
        yield moved.get(other, other)
        moved[other] = moved.pop(place, place)


def _at(space: Mapping[str, _Range], index: int) -> Config:
    """The configuration with this number, as the digits of a number whose bases are the ranges' sizes."""
    config = {}
    for name, one in reversed(list(space.items())):
        index, digit = divmod(index, one.count or 1)
        config[name] = one.at(digit)
    return {name: config[name] for name in space}


def _merged(space: Mapping[str, _Range], fixed: Mapping[str, _Range], place: int, drawn: Config) -> Config:
    both = {**_at(fixed, place), **drawn}
    return {name: both[name] for name in space}


# --- details --------------------------------------------------------------------------------------------------------


def _refused(words: str, hint: str) -> PydanticCustomError:
    return PydanticCustomError("search_range", "{words}", {"words": words, "hint": hint})


def _ascending(ends: Any) -> Any:
    low, high = ends
    if low == high:
        raise _refused(f"begins and ends at {low:g}: that is one value, no range", "Set the field itself, or widen it.")
    if low > high:
        raise _refused(f"goes from {low:g} down to {high:g}: it is empty", f"Write [{high:g}, {low:g}].")
    return ends


def _distinct(values: list[Any]) -> list[Any]:
    if not values:
        raise _refused("is empty", "List the values to try.")
    twice = next((value for place, value in enumerate(values) if value in values[:place]), ...)
    if twice is not ...:
        raise _refused(f"has {twice!r} twice", "Keep one of them; the same trial would be paid for twice.")
    return values


def _short(value: float, within: _Interval) -> float:
    """With four digits that matter inside its range, so that a configuration can be read, said and typed."""
    digits = 4 + max(0, round(math.log10(max(map(abs, within.ends)) / (within.high - within.low))))
    return min(max(float(f"{value:.{min(digits, 17)}g}"), within.low), within.high)
