"""Blocks and the scheduler keep their books. Milliseconds."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.blocks import BlockPool, block_name, root_name
from serving.engine.scheduler import Limits, Scheduler, Sequence


def test_a_block_is_named_by_all_that_stands_before_it_and_by_the_adapter():
    first = block_name(root_name("sha256:a"), [1, 2])
    assert block_name(root_name("sha256:a"), [1, 2]) == first
    others = {block_name(root_name(None), [1, 2]), block_name(root_name("sha256:b"), [1, 2]), block_name(first, [1, 2])}
    assert len(others | {first}) == 4


def test_what_was_released_is_found_until_it_is_needed_and_the_oldest_goes_first():
    pool = BlockPool(count=3, size=2)
    taken = pool.take(3)
    for block, name in zip(taken, (b"a", b"b", b"c"), strict=True):
        pool.name(block, name)
    pool.release(taken[:1])
    pool.release(taken[1:])
    assert (pool.held, pool.available) == (0, 3)
    assert pool.find([b"a", b"b", b"c"]) == taken
    pool.take(1)
    assert pool.find([b"a"]) == []
    pool.take(1)
    assert pool.find([b"c"]) == []  # the last of its sequence is the least likely to be shared
    pool.hold(pool.find([b"b"]))
    assert (pool.held, pool.available) == (3, 0)


def test_a_forgotten_block_is_not_found_again():
    pool = BlockPool(count=2, size=2)
    (block,) = pool.take(1)
    pool.name(block, b"a")
    pool.forget([block])
    pool.release([block])
    assert pool.find([b"a"]) == []
    assert pool.available == 2


def test_decoding_comes_before_reading_prompts_and_the_budget_holds():
    scheduler = Scheduler(Limits(cache_tokens=256, block_size=8, max_sequences=4, batch_tokens=8))
    answering, reading = Sequence([1, 2]), Sequence(list(range(30)))
    scheduler.add(answering)
    for work in scheduler.plan():
        scheduler.advance(work)
    answering.tokens.append(3)
    scheduler.add(reading)
    plan = scheduler.plan()
    assert [(w.sequence, w.count, w.chooses) for w in plan] == [(answering, 1, True), (reading, 7, False)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_no_block_is_lost_and_every_sequence_ends(seed):
    """Random arrivals, tenants, lengths, common beginnings and aborts in a cache that is too small for them."""
    chance = random.Random(seed)
    limits = Limits(cache_tokens=96, block_size=4, max_sequences=5, batch_tokens=9)
    scheduler, wanted = Scheduler(limits), {}
    for _ in range(12):
        start = [chance.randrange(3)] * chance.randrange(1, 30)
        sequence = Sequence(start, chance.choice([None, "a"]), chance.choice(["x", "x", "y", "z"]))
        wanted[sequence] = len(start) + chance.randrange(1, 40)
        scheduler.add(sequence)
    for _ in range(2000):
        plan = scheduler.plan()
        if not plan:
            break
        assert sum(w.count for w in plan) <= limits.batch_tokens
        held = [block for w in scheduler.running for block in w.blocks]
        assert len(set(held)) == scheduler.pool.held
        for work in plan:
            assert len(work.sequence.blocks) * 4 >= work.sequence.computed + work.count
            chooses = work.chooses
            scheduler.advance(work)
            if chooses:
                work.sequence.tokens.append(chance.randrange(3))
                if len(work.sequence.tokens) >= wanted[work.sequence] or chance.random() < 0.02:
                    scheduler.remove(work.sequence)
                    del wanted[work.sequence]
    assert not wanted
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pool.available == limits.blocks
