"""The arithmetic of limits: what fits, how long to wait, and that no sequence of requests gets more than its limit."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.limits.buckets import Buckets, Refused
from orchestrator.limits.quota import Quota

FREE = Quota()
TIGHT = Quota(requests_per_minute=60, tokens_per_minute=600, concurrent_requests=2)


def reserve(buckets: Buckets, quota: Quota, tokens: int, now: float, in_flight: int = 0) -> Buckets | Refused:
    return buckets.drained(quota, now).reserve(quota, tokens, in_flight)


def test_a_burst_takes_the_whole_limit_and_then_waits_its_turn():
    buckets = Buckets(at=100.0)
    for _ in range(60):
        buckets = reserve(buckets, TIGHT, 1, 100.0)
        assert isinstance(buckets, Buckets)
    refused = reserve(buckets, TIGHT, 1, 100.0)
    assert refused == Refused("requests_per_minute", 60, 1.0)
    assert isinstance(reserve(buckets, TIGHT, 1, 101.0), Buckets)
    assert isinstance(reserve(buckets, TIGHT, 1, 100.9), Refused)


def test_the_longest_wait_is_named():
    buckets = Buckets(requests=60.0, tokens=600.0, at=0.0)
    assert reserve(buckets, TIGHT, 1, 0.0) == Refused("requests_per_minute", 60, 1.0)
    assert reserve(buckets, TIGHT, 300, 0.0) == Refused("tokens_per_minute", 600, 30.0)


def test_what_can_never_fit_says_so():
    refused = reserve(Buckets(), TIGHT, 601, 0.0)
    assert refused == Refused("tokens_per_minute", 600, None)
    assert "try again" not in str(refused)
    for limit in Quota.model_fields:
        closed = Quota.model_validate({limit: 0})
        assert reserve(Buckets(), closed, 1, 1e9) == Refused(limit, 0, None)  # type: ignore[arg-type]


def test_concurrency():
    assert isinstance(reserve(Buckets(), TIGHT, 1, 0.0, in_flight=1), Buckets)
    refused = reserve(Buckets(), TIGHT, 1, 0.0, in_flight=2)
    assert isinstance(refused, Refused)
    assert (refused.limit, refused.allowed) == ("concurrent_requests", 2)


def test_without_limits_everything_fits():
    assert isinstance(reserve(Buckets(), FREE, 10**12, 0.0, in_flight=10**6), Buckets)


def test_more_than_reserved_is_a_debt_that_is_waited_out():
    buckets = reserve(Buckets(), TIGHT, 100, 0.0)
    assert isinstance(buckets, Buckets)
    owing = buckets.correct(tokens=1100)  # 1,200 used, of 600 a minute
    refused = reserve(owing, TIGHT, 10, 0.0)
    assert refused == Refused("tokens_per_minute", 600, 61.0)
    assert isinstance(reserve(owing, TIGHT, 10, 61.0), Buckets)


def test_less_than_reserved_is_given_back_and_never_more():
    buckets = reserve(Buckets(), TIGHT, 100, 0.0)
    assert isinstance(buckets, Buckets)
    assert buckets.correct(tokens=-100, requests=-1) == Buckets()
    late = buckets.drained(TIGHT, 60.0).correct(tokens=-100, requests=-1)
    assert (late.requests, late.tokens) == (0.0, 0.0), "what has drained is not given back again"


def test_a_raised_quota_counts_at_once_and_a_lowered_one_too():
    full = Buckets(requests=60.0)
    assert isinstance(reserve(full, TIGHT, 1, 0.0), Refused)
    assert isinstance(reserve(full, replace_quota(requests_per_minute=61), 1, 0.0), Buckets)
    assert isinstance(reserve(Buckets(requests=10.0), replace_quota(requests_per_minute=5), 1, 0.0), Refused)


def replace_quota(**changes: int) -> Quota:
    return TIGHT.model_copy(update=changes)


def test_a_clock_that_goes_back_gives_nothing():
    full = Buckets(requests=60.0, at=100.0)
    assert full.drained(TIGHT, 50.0) == full
    assert full.drained(TIGHT, 50.0).drained(TIGHT, 100.0) == full


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 3_000), st.integers(0, 3_000)), max_size=60),
)
def test_no_sequence_gets_more_than_a_burst_and_the_rate(per_minute: int, steps: list[tuple[float, int, int]]):
    """Settled tokens up to any moment ≤ limit + limit/60 × seconds + what is over the last estimates."""
    quota, buckets, now, used, over = Quota(tokens_per_minute=per_minute), Buckets(), 0.0, 0, 0
    for wait, estimated, actual in steps:
        now += wait
        taken = reserve(buckets, quota, estimated, now)
        if isinstance(taken, Buckets):
            buckets = taken.correct(tokens=actual - estimated)
            used += actual
            over = max(over, actual - estimated)  # a debt stops everything until it is paid, so only one is open
            assert used <= per_minute * (1 + now / 60) + over + 0.01
        elif taken.retry_after is not None:
            later = now + taken.retry_after
            assert isinstance(reserve(buckets, quota, estimated, later), Buckets), "retry_after is enough"
            if taken.retry_after > 0.01:
                early = reserve(buckets, quota, estimated, later - 0.01)
                assert isinstance(early, Refused) or per_minute / 60 * 0.01 < 1e-5, "and no more than needed"


def test_levels_are_never_negative():
    assert replace(Buckets(), tokens=5.0).correct(tokens=-10).tokens == 0.0
