"""What the scheduler says of its load. Milliseconds: no tensor is touched."""

from __future__ import annotations

from serving.engine.scheduler import Limits, Scheduler, Sequence


def test_unread_tokens_are_those_of_prompts_that_wait_or_are_being_read():
    scheduler = Scheduler(Limits(cache_tokens=1024, batch_tokens=100, max_sequences=2))
    for length in (150, 40, 30):
        scheduler.add(Sequence(list(range(length))))
    assert scheduler.unread == 220
    for work in scheduler.plan():
        scheduler.advance(work)
    assert scheduler.unread == 120  # of the first, and all of the others
    for work in scheduler.plan():
        scheduler.advance(work)
    assert scheduler.unread == 30  # two are read, and the third has no place
    answering = scheduler.running[0]
    answering.tokens.append(7)
    assert scheduler.unread == 30  # an answer's next token is not waited for
