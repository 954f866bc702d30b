"""For how long a gateway repeats that an engine is full. Milliseconds."""

from __future__ import annotations

import pytest

from orchestrator.errors import EngineOverloaded
from orchestrator.routing.table import Choice
from serving.gateway.full import _KEPT, MOST_SECONDS, FullEngines


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def choice(adapter: str | None = "a", base: str = "b") -> Choice:
    return Choice("acme/intents", adapter, "tiny", base)


def full(engines: FullEngines, tenant: str, asked: Choice) -> bool:
    try:
        engines.check(tenant, asked)
    except EngineOverloaded:
        return True
    return False


@pytest.mark.parametrize(("answer", "moment"), [(0.16, 0.01), (1.6, 0.1), (60.0, MOST_SECONDS)])
def test_a_moment_is_a_part_of_an_answers_time(answer: float, moment: float):
    engines = FullEngines(clock=(clock := Clock()))
    for _ in range(200):
        engines.ended("b", answer)
    engines.tell("acme", choice(), EngineOverloaded("full"))
    clock.now += 0.9 * moment
    assert full(engines, "acme", choice())
    clock.now += 0.2 * moment
    assert not full(engines, "acme", choice())


def test_nobody_elses_and_no_other_adapters():
    engines = FullEngines(clock=Clock())
    engines.ended("b", 8.0)
    engines.tell("acme", choice(), EngineOverloaded("full"))
    assert full(engines, "acme", choice())
    assert not full(engines, "globex", choice())
    assert not full(engines, "acme", choice("other"))
    assert not full(engines, "acme", choice(base="other"))


def test_where_all_replicas_have_refused_no_other_adapters_either():
    engines = FullEngines(clock=Clock())
    engines.ended("b", 8.0)
    engines.tell("acme", choice(), EngineOverloaded("full", everywhere=True))
    for adapter in ("a", "other", None):
        assert full(engines, "acme", choice(adapter))
        assert not full(engines, "globex", choice(adapter))
        assert not full(engines, "acme", choice(adapter, base="other"))


def test_the_base_alone_refused_by_one_replica_says_nothing_of_adapters():
    engines = FullEngines(clock=Clock())
    engines.ended("b", 8.0)
    engines.tell("acme", choice(None), EngineOverloaded("full"))
    assert full(engines, "acme", choice(None))
    assert not full(engines, "acme", choice("a"))


def test_before_anything_was_answered_the_engine_is_asked():
    engines = FullEngines(clock=Clock())
    engines.tell("acme", choice(), EngineOverloaded("full"))
    assert not full(engines, "acme", choice())


def test_nothing_of_the_request_is_kept():
    engines = FullEngines(clock=Clock())
    try:
        raise EngineOverloaded("full")
    except EngineOverloaded as error:
        engines.tell("acme", choice(), error)
    ((_, kept),) = engines._told.values()
    assert kept.__traceback__ is None


def test_what_has_ended_is_forgotten():
    engines = FullEngines(clock=(clock := Clock()))
    engines.ended("b", 8.0)
    for number in range(3 * _KEPT):
        clock.now += 0.001
        engines.tell("acme", choice(str(number)), EngineOverloaded("full"))
    assert len(engines._told) <= _KEPT
