"""The arithmetic of limits, without clocks, locks or storage.

Two token buckets a tenant, kept as what was taken out of them: a level that falls by `limit / 60` each second, never below
zero, and to which each reservation adds. So an untouched tenant is zero, and a raised quota counts at once. A bucket lets its
whole limit through in one burst and then the limit per minute: at most twice the limit in any one minute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.limits.quota import Quota

CONCURRENCY_RETRY = 1.0
"""Seconds after which to try again when too many requests are being answered; when one ends cannot be known."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request may not start now."""

    limit: Literal["requests_per_minute", "tokens_per_minute", "concurrent_requests"]
    allowed: int
    retry_after: float | None
    """Seconds until the same request would fit if nothing else came; None when it never will."""

    def __str__(self) -> str:
        what = self.limit.replace("_", " ")
        if self.retry_after is None:
            return f"The request asks for more than the tenant's limit of {self.allowed} {what}."
        return f"The tenant's limit of {self.allowed} {what} is reached; try again in {self.retry_after:.1f} s."


@dataclass(frozen=True, slots=True)
class Buckets:
    """Levels of a tenant's buckets at the time `at` (seconds on any one clock)."""

    requests: float = 0.0
    tokens: float = 0.0
    at: float = 0.0

    def drained(self, quota: Quota, now: float) -> Buckets:
        """The levels at `now`. A clock that went back, or another gateway's that is behind, drains nothing."""
        seconds = max(now - self.at, 0.0)
        return Buckets(
            requests=_drain(self.requests, quota.requests_per_minute, seconds),
            tokens=_drain(self.tokens, quota.tokens_per_minute, seconds),
            at=max(now, self.at),
        )

    def reserve(self, quota: Quota, tokens: int, in_flight: int) -> Buckets | Refused:
        """The levels with one more request of so many tokens in them, or why not. `self` must be drained."""
        if quota.concurrent_requests is not None and in_flight >= quota.concurrent_requests:
            never = quota.concurrent_requests == 0
            return Refused("concurrent_requests", quota.concurrent_requests, None if never else CONCURRENCY_RETRY)
        waits = [
            refused
            for refused in (
                _over("requests_per_minute", self.requests, 1, quota.requests_per_minute),
                _over("tokens_per_minute", self.tokens, tokens, quota.tokens_per_minute),
            )
            if refused is not None
        ]
        if waits:  # the one that takes longest: trying again after the other would be refused again
            return max(waits, key=lambda refused: float("inf") if refused.retry_after is None else refused.retry_after)
        return replace(self, requests=self.requests + 1, tokens=self.tokens + tokens)

    def correct(self, *, requests: int = 0, tokens: int = 0) -> Buckets:
        """The levels with so much more (or less) in them; more than the limit is a debt that is waited out."""
        return replace(self, requests=max(self.requests + requests, 0.0), tokens=max(self.tokens + tokens, 0.0))


def _drain(level: float, limit: int | None, seconds: float) -> float:
    return 0.0 if limit is None else max(level - limit / 60 * seconds, 0.0)


_ROUNDING = 1e-6
"""Of a request or token: a level that has waited exactly `retry_after` must not fail by the last digit of a float."""


def _over(
    name: Literal["requests_per_minute", "tokens_per_minute"], level: float, more: int, limit: int | None
) -> Refused | None:
    if limit is None or level + more <= limit + _ROUNDING:
        return None
    return Refused(name, limit, None if more > limit else (level + more - limit) / (limit / 60))
