"""How much of prompts goes into a step beside answers. Milliseconds: no tensor is touched, and time is told."""

from __future__ import annotations

import pytest

from serving.engine.pace import LEAST, PromptPace
from serving.engine.scheduler import Limits, Scheduler, Sequence


def test_as_many_as_may_take_so_long():
    pace = PromptPace(0.5)
    assert pace.tokens(answering=8) == LEAST, "how long they take is not known yet"
    pace.took(LEAST, LEAST * 0.001)
    assert pace.tokens(answering=8) == 500 - 8
    for _ in range(50):
        pace.took(492, 492 * 0.002)
    assert pace.tokens(answering=8) == pytest.approx(250 - 8, abs=1)


def test_never_fewer_than_a_matmul_takes_for_next_to_nothing():
    pace = PromptPace(0.5)
    pace.took(512, 5.12)
    assert pace.tokens(answering=32) == LEAST


def test_answers_alone_say_nothing():
    pace = PromptPace(0.5)
    pace.took(512, 0.512)
    for _ in range(50):
        pace.took(8, 0.12)
    assert pace.tokens(answering=8) == 500 - 8


def test_where_nobody_waits_for_a_token_or_none_minds_all_go_at_once():
    unmeasured = PromptPace(0.5)
    assert unmeasured.tokens(answering=0) is None
    unminded = PromptPace(None)
    unminded.took(512, 5.12)
    assert unminded.tokens(answering=8) is None


@pytest.mark.parametrize(("each", "read"), [(0.01, LEAST), (0.001, 99), (0.0001, 127)])
def test_a_step_of_the_scheduler(each: float, read: int):
    scheduler = Scheduler(Limits(cache_tokens=4096, batch_tokens=128, step_seconds=0.1))
    first, long = Sequence(list(range(100))), Sequence(list(range(1000)))
    scheduler.add(first)
    for work in scheduler.plan():
        scheduler.advance(work)
    first.tokens.append(7)
    scheduler.add(long)
    scheduler.pace.took(100, 100 * each)
    assert [(work.sequence, work.count) for work in scheduler.plan()] == [(first, 1), (long, read)]
