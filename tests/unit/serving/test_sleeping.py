"""Who is told when routes change. About five seconds, most of it imports."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from serving.app import Prefetching, _awake, _Base
from serving.residency import REPLICAS

ALWAYS, SLEEPING = "sha256:" + "a" * 64, "sha256:" + "b" * 64
BASES = [_Base("always", "x", ALWAYS, 512, sleeps=False), _Base("sleeping", "y", SLEEPING, 512, sleeps=True)]

LOOP: Any = SimpleNamespace(call_soon_threadsafe=lambda function, *arguments: function(*arguments))


class Handle:
    """Of a deployment; remembers which adapters its replicas were told of."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.prefetch = SimpleNamespace(remote=lambda *, adapter: self.told.append(adapter))


@pytest.fixture
def handles() -> dict[str, Handle]:
    return {ALWAYS: Handle(), SLEEPING: Handle()}


@pytest.fixture(autouse=True)
def _no_replicas() -> Iterator[None]:
    yield
    REPLICAS.clear()


def prefetching(handles: dict[str, Handle]) -> Prefetching:
    return Prefetching(handles, {"one": ALWAYS, "two": SLEEPING, "three": SLEEPING}, awake=_awake(BASES), loop=LOOP)


def table(*adapters: str) -> Any:
    return SimpleNamespace(adapters=lambda: frozenset(adapters))


def test_replicas_are_told_of_what_is_new(handles):
    ahead = prefetching(handles)
    ahead.follow(table("one"))
    ahead.follow(table("one", "unknown"))
    assert handles[ALWAYS].told == ["one"]


def test_a_base_without_replicas_is_not_started_by_a_changed_route(handles):
    ahead = prefetching(handles)
    ahead.follow(table("one", "two"))
    assert handles[SLEEPING].told == []
    REPLICAS[BASES[1].deployment] = {"r1": {}}
    ahead.follow(table("one", "two", "three"))
    assert handles[SLEEPING].told == ["three"]
