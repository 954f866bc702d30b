"""Reserve before a request starts, settle when it has ended: the protocol, and the limiter of a single gateway process."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.limits.buckets import Buckets, Refused
from orchestrator.limits.quota import Quota


@dataclass(frozen=True, slots=True)
class Reservation:
    """A request's place: it holds one of the tenant's concurrent requests until it is settled or cancelled."""

    tenant: str
    quota: Quota
    """As it was when the request came."""
    tokens: int
    """Estimated: prompt and the most that may be generated."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Limiter(Protocol):
    """Safe from several threads. Settling or cancelling a reservation a second time changes nothing."""

    waits: bool
    """For a database: an event loop calls it on a thread."""

    def reserve(self, tenant: str, quota: Quota, estimated_tokens: int) -> Reservation | Refused:
        """A place for a request that may use so many tokens, or why there is none. What is refused costs nothing."""

    def settle(self, reservation: Reservation, actual_tokens: int) -> None:
        """The request has ended, well or badly, and has used so many tokens: the difference is given back or taken."""

    def cancel(self, reservation: Reservation) -> None:
        """The request never began (no replica, say): all of it is given back, the request too."""


@dataclass(slots=True)
class _Account:
    buckets: Buckets
    in_flight: dict[str, Reservation] = field(default_factory=dict)


class LocalLimiter:
    """Counts in this process's memory. Tenants are few and an account is small, so none is ever dropped."""

    waits = False

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._accounts: dict[str, _Account] = {}

    def reserve(self, tenant: str, quota: Quota, estimated_tokens: int) -> Reservation | Refused:
        with self._lock:
            account = self._accounts.setdefault(tenant, _Account(Buckets(at=self._clock())))
            account.buckets = account.buckets.drained(quota, self._clock())
            taken = account.buckets.reserve(quota, estimated_tokens, len(account.in_flight))
            if isinstance(taken, Refused):
                return taken
            reservation = Reservation(tenant, quota, estimated_tokens)
            account.buckets, account.in_flight[reservation.id] = taken, reservation
            return reservation

    def settle(self, reservation: Reservation, actual_tokens: int) -> None:
        self._end(reservation, tokens=actual_tokens - reservation.tokens)

    def cancel(self, reservation: Reservation) -> None:
        self._end(reservation, tokens=-reservation.tokens, requests=-1)

    def in_flight(self, tenant: str) -> int:
        with self._lock:
            account = self._accounts.get(tenant)
            return len(account.in_flight) if account else 0

    def _end(self, reservation: Reservation, *, tokens: int, requests: int = 0) -> None:
        with self._lock:
            account = self._accounts[reservation.tenant]
            if account.in_flight.pop(reservation.id, None) is None:
                return
            drained = account.buckets.drained(reservation.quota, self._clock())
            account.buckets = drained.correct(requests=requests, tokens=tokens)
