"""Between Tune's trials and the workers that compute them: trials lease a place there, and are told how they do.

Train's workers cannot be called, and a trial that Tune kills runs no clean-up. So both sides come to the broker: a trial asks
for its next report, which renews its lease, and the group's rank 0 comes by between two steps to bring reports and to fetch
what has changed. A trial that does not ask for a while has gone, and its place with it. Where groups have one trial at a time, the
sweep's driver asks for a trial for each group that it starts, and each rank 0 speaks for its trial and asks for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

LEASE_SECONDS = 600.0
"""That a trial which no longer asks keeps its place. Tune says at once when one has ended or died; this is for what it does not
say, and a driver that stands still for minutes must not cost its trials what they have learnt."""
POLL_SECONDS = 10.0
"""That one question waits for a report."""

SETTLING_SECONDS = 5.0
"""After a broker was killed, until the next one gives trials to groups: those that have one come by every second and say so."""

DECISION_SECONDS = 5.0
"""That the group waits after an epoch for the scheduler to say who goes on. A step of lanes that are stopped a moment later costs
more; a driver that does not answer must not hold up all."""

GATHERING_SECONDS = 30.0
"""That a new group waits for the trials which a sweep begins with. Their processes start one after the other, and only those that
train side by side come to the end of an epoch together, where the scheduler compares them."""

RUNG = "rung"
"""In reports of trials that go on: epochs done. What ends has none, since the scheduler must not compare a short schedule that
is finished with a long one that is not."""
PEERS = "peers"
"""In reports with a rung: [trial, validation loss] of the others that came to the same one at the same step. A list, since Tune takes
dicts apart before its scheduler sees them."""

Config = dict[str, Any]
"""Field of the spec → value: `{"train.learning_rate": 0.001}`."""
Report = dict[str, Any]
"""What `jobs.sweep.packed.TrialReport` says, as JSON has it; `step` numbers it, and `state` says whether it is the last."""


class Dismissed(Exception):
    """Nobody waits for the trial's reports any more."""


@dataclass
class Orders:
    """What the group does before its next step."""

    open: dict[str, Config] = field(default_factory=dict)
    close: list[str] = field(default_factory=list)
    finish: bool = False
    """No trial will come any more."""
    best: str | None = None
    """The winner, at the end."""
    sweep: dict[str, Any] | None = None
    """`SweepResult`, at the end."""
    error: dict[str, Any] | None = None
    """Why there is no winner, as `AdaptoryError.to_dict` says it."""
    broker: str = field(default="", compare=False)
    """Whose they are: another's than before, if it was killed. It knows only of trials that came to it since."""


@dataclass
class _Lease:
    config: Config
    holder: str
    asked_at: float
    reports: list[Report] = field(default_factory=list)
    known: bool = False
    """The group has been told of it."""
    asked: int | None = None
    """Number of the report that was asked for last: those before it have been decided about."""
    at: Report = field(default_factory=dict)
    """Where it was seen last, if its own group says it."""
    group: str | None = None
    """That trains it, where groups have one trial at a time."""

    def take(self, reports: list[Report]) -> None:
        """What is new of them; nothing comes after a trial's end."""
        for report in reports:
            last = self.reports[-1]["step"] if self.reports else -1
            if not self.ended and (report["step"] > last or report["state"] != "running"):
                self.reports.append(report)

    @property
    def ended(self) -> bool:
        return bool(self.reports) and self.reports[-1]["state"] != "running"

    @property
    def undecided(self) -> bool:
        """Whether the trial's process has yet to come back from the scheduler with its last report."""
        if self.asked is None or self.ended or not self.reports or RUNG not in self.reports[-1]:
            return False
        return self.asked < len(self.reports)


class Broker:
    """Lives in an actor of its own (asyncio, no torch), and loses nothing when trials or the group die. When it dies itself, trials come
    to the next one for a place, and the group drops those that do not.

    Args:
        clock: seconds.
        first: trials that a packed group waits for before it begins.
        again: in the place of one that was killed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, first: int = 0, again: bool = False):
        self._clock, self._id = clock, uuid.uuid4().hex
        self._first = 0 if again else first
        self._gather_until = 0.0
        self._worker = asyncio.Event()
        self._settled_at = clock() + (SETTLING_SECONDS if again else 0.0)
        self._leases: dict[str, _Lease] = {}
        self._to_close: list[str] = []
        self._end: Orders | None = None
        self._wish: str | None = None
        self._dismissed = False
        self._idle: set[str] = set()
        """Groups that wait for a trial."""
        self._failures = Counter[str]()
        """Of workers, by trial; of those that have none, by group."""
        self._crowner: str | None = None
        """The group that sees to the winner."""
        self._progress: dict[str, Report] = {}
        self._decided: dict[str, int] = {}
        self._changed = asyncio.Condition()

    # for trials

    async def lease(self, trial: str, config: Config, holder: str) -> None:
        """Ask for a place; asked again by a later holder (a trial that was started anew), its course goes on where it is."""
        held = self._leases.get(trial)
        if held is None or held.config != config:
            self._leases[trial] = _Lease(config, holder, self._clock())
        else:
            held.holder, held.asked_at = holder, self._clock()
        await self._tell()

    async def report(self, trial: str, holder: str, number: int, patience: float = POLL_SECONDS) -> Report | None:
        """A trial's report by number, from 0; None: not yet, ask again.

        Raises:
            LookupError: the lease is over: it ran out, or another holds it.
            Dismissed: there will be no report that anybody wants.
        """
        deadline = self._clock() + patience
        async with self._changed:
            while True:
                if self._dismissed:
                    raise Dismissed
                held = self._leases.get(trial)
                if held is None or held.holder != holder:
                    raise LookupError(f"The trial {trial} has no place any more.")
                held.asked_at = self._clock()
                if number != held.asked:
                    held.asked = number
                    self._changed.notify_all()
                if number < len(held.reports):
                    return self._undecided(trial, held.reports[number])
                left = deadline - self._clock()
                if left <= 0:
                    return None
                try:
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                except TimeoutError:
                    return None

    async def release(self, trial: str, holder: str | None = None) -> None:
        """Give the place back; without a holder, whoever has it."""
        held = self._leases.get(trial)
        if held is not None and holder in (None, held.holder):
            del self._leases[trial]
            if held.known and not held.ended:
                self._to_close.append(trial)
            await self._tell()

    # for the group

    async def coming(self) -> None:
        """A worker's process is there, and has yet to load what it needs."""
        self._worker.set()

    async def hello(self) -> None:
        """A group has started: it knows of no trial, whatever the one before it knew."""
        self._gather_until = self._clock() + GATHERING_SECONDS
        self._to_close.clear()
        for held in self._leases.values():
            held.known = False

    async def sync(
        self, reports: dict[str, list[Report]], progress: dict[str, Report] | None = None, patience: float = 0.0
    ) -> Orders:
        """Take in reports, which may repeat older ones, and say what has changed: also by what was just reported, if the scheduler
        decides in time.

        Args:
            reports: of each trial, its course from the beginning or from any point on, in order.
            progress: where each trial is, for people to watch.
            patience: seconds to wait for something to do: of a group without work.
        """
        self._progress |= progress or {}
        await self._take(reports)
        deadline = self._clock() + patience
        async with self._changed:
            while not (orders := self._orders()) and (left := deadline - self._clock()) > 0:
                try:
                    async with asyncio.timeout(left):
                        await self._changed.wait()
                except TimeoutError:
                    break
        return replace(orders or Orders(), broker=self._id)

    # for groups that have one trial at a time

    async def assign(self, group: str, patience: float = 0.0, *, to_start: bool = False) -> Orders:
        """What the group trains: the trial that it has, if that has not ended, or else one that no group has; at the sweep's end one of
        those that wait sees to the winner. Nothing, if there is nothing, or all are to end.

        Args:
            patience: seconds to wait for something to do.
            to_start: the group is yet to be started: what one that waits can have is not for it.
        """
        deadline = self._clock() + patience
        async with self._changed:
            if not to_start:
                self._idle.add(group)
            try:
                while not (orders := self._work(group, to_start)) and (left := deadline - self._clock()) > 0:
                    until = self._settled_at - self._clock()
                    try:
                        async with asyncio.timeout(min(left, until) if until > 0 else left):
                            await self._changed.wait()
                    except TimeoutError:
                        continue
            finally:
                self._idle.discard(group)
                self._changed.notify_all()
        return orders or Orders()

    async def tell(self, trial: str, group: str, reports: list[Report], at: Report | None = None) -> str | None:
        """Take in the trial's reports, wait for what the scheduler decides about them, and say what is wanted of the trial: None, that
        it goes on, `pause` or `cancel`.

        Args:
            at: where it is now.
        """
        at = at or (reports[-1] if reports else None)
        if held := self._leases.get(trial):
            held.group = held.group or group
            if held.group != group:
                return "cancel"
            if at:
                held.at = self._progress[trial] = at
        await self._take({trial: reports} if reports else {})
        return self._wish or (None if await self.goes_on(trial) else "cancel")

    async def goes_on(self, trial: str) -> bool:
        """Whether it has not ended."""
        held = self._leases.get(trial)
        return held is not None and not held.ended

    async def failed(self, group: str) -> int:
        """The group's workers have failed. How often it has happened over their trial."""
        held = self._held_by(group)
        over = held[0] if held else group
        self._failures[over] += 1
        return self._failures[over]

    async def left(self, group: str, state: str | None = None, message: str = "") -> str | None:
        """The group has ended, and with it the trial that it had, which otherwise another group may have.

        Args:
            state: how the trial has ended; None: it has not.

        Returns:
            The trial that has ended.
        """
        held = self._held_by(group)
        if held is None:
            return None
        if state is not None:
            await self.end(held[0], state, message)
            return held[0]
        held[1].group = None
        await self._tell()
        return None

    async def crowner(self) -> str | None:
        """The group that sees to the winner, once one does."""
        return self._crowner

    async def wind_down(self, wish: str) -> None:
        """Have all groups end: what they are told from now on, `pause` or `cancel`."""
        self._wish = wish
        await self._tell()

    # for the driver

    async def worker(self, patience: float) -> bool:
        """Whether a worker's process is there, once it is, or `patience` seconds have passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._worker.wait()
        return self._worker.is_set()

    async def end(self, trial: str, state: str, message: str) -> bool:
        """End a trial before its end; False if it has no place yet."""
        held = self._leases.get(trial)
        if held is not None and not held.ended:
            last = {"step": 0, **(held.reports[-1] if held.reports else {}), **held.at}
            last = {name: value for name, value in last.items() if name not in (RUNG, PEERS)}
            held.reports.append(last | {"state": state, "message": message})
            if held.known:
                self._to_close.append(trial)
            await self._tell()
        return held is not None

    async def dismiss(self) -> None:
        """Let the trials' processes go, which wait for reports: Tune has ended, and would wait for them."""
        self._dismissed = True
        await self._tell()

    async def decided(self, steps: dict[str, int]) -> None:
        """Up to which step an attempt before this one has decided about trials. Tune's scheduler remembers nothing of it, and
        would decide again, among those only that were good enough then."""
        self._decided |= steps

    async def progress(self) -> dict[str, Report]:
        """Where trials are that have moved since this was asked last."""
        moved, self._progress = self._progress, {}
        return moved

    async def finish(self, best: str | None, sweep: dict[str, Any] | None, error: dict[str, Any] | None = None) -> None:
        """Said once: what is said later does not count."""
        if self._end is None:
            self._end = Orders(finish=True, best=best, sweep=sweep, error=error)
            await self._tell()

    # details

    async def _take(self, reports: dict[str, list[Report]]) -> None:
        for trial, new in reports.items():
            if held := self._leases.get(trial):
                held.take(new)
        if reports:
            await self._tell()
            await self._decisions(reports)

    def _orders(self) -> Orders | None:
        self._expire()
        if self._end is None and len(self._leases) < self._first and self._clock() < self._gather_until:
            return None
        self._first = 0  # from now on nobody waits for those that come later
        fresh = {trial: held.config for trial, held in self._leases.items() if not (held.known or held.ended)}
        for trial in fresh:
            self._leases[trial].known = True
        gone, self._to_close = self._to_close, []
        if self._end is not None:
            return replace(self._end, open={}, close=gone)
        if fresh or gone:
            return Orders(fresh, [trial for trial in gone if trial not in fresh])
        return None

    def _work(self, group: str, to_start: bool) -> Orders | None:
        self._expire()
        if self._wish is not None:
            return Orders()
        if held := self._held_by(group):
            return Orders({held[0]: held[1].config})
        if self._end is not None:
            if not to_start:
                self._crowner = self._crowner or group
            return self._end if self._crowner == group else Orders()
        if self._clock() < self._settled_at or (to_start and self._idle):
            return None
        for trial, one in self._leases.items():
            if one.group is None and not one.ended:
                one.group = group
                return Orders({trial: one.config})
        return None

    def _held_by(self, group: str) -> tuple[str, _Lease] | None:
        """The trial that the group has, if that has not ended."""
        return next(((t, held) for t, held in self._leases.items() if held.group == group and not held.ended), None)

    def _undecided(self, trial: str, report: Report) -> Report:
        """Without its rung, if it was decided about before."""
        if report["step"] > self._decided.get(trial, -1):
            return report
        return {name: value for name, value in report.items() if name != RUNG}

    async def _decisions(self, reports: dict[str, list[Report]]) -> None:
        """Until the scheduler has decided about all that has just reported, or takes too long."""

        def all_decided() -> bool:
            return not any(held.undecided for trial in reports if (held := self._leases.get(trial)))

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DECISION_SECONDS), self._changed:
                await self._changed.wait_for(all_decided)

    def _expire(self) -> None:
        oldest = self._clock() - LEASE_SECONDS
        for trial in [t for t, held in self._leases.items() if held.asked_at < oldest]:
            held = self._leases.pop(trial)
            if held.known and not held.ended:
                self._to_close.append(trial)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
