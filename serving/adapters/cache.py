"""Which adapters are in memory and in the engine, and who may use them: one `AdapterCache` for each replica.

The engine's adapters are all in memory, too, so leaving the engine costs nothing and coming back costs one swap. What is
leased, waited for or pinned never leaves. Loads run elsewhere (`serving.adapters.process`), a few at once, those that
somebody waits for first; one task then finds room for what has come. Nothing leaves before its successor is here and
checked, so a load that fails costs nothing that is resident.

All of it belongs to one event loop: no locks, no other thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.errors import (
    AdapterCacheFull,
    AdapterError,
    AdapterInUse,
    AdapterLoadTimeout,
    AdapterUnavailable,
    AdaptoryError,
    EngineStopped,
)
from serving.adapters.admission import check_digest
from serving.adapters.eviction import Worth
from serving.adapters.process import Loaded
from serving.engine.prepared import Prepared

log = logging.getLogger(__name__)


class Loads(Protocol):
    """Where adapters come from: `serving.adapters.process.LoaderProcess`."""

    async def load(self, digest: str) -> Loaded: ...


class Slots(Protocol):
    """Where they go: an `Engine`."""

    async def swap_adapters(self, install: Mapping[str, Prepared], remove: Collection[str]) -> None: ...


@dataclass(frozen=True)
class CacheLimits:
    slots: int = 64
    """In the engine at once; at most its own `max_adapters`."""
    memory: int = 4 << 30
    """Bytes of all adapters in memory, the engine's included. What is being loaded comes on top: `loads` adapters at most."""
    loads: int = 4
    """At once."""
    swaps: int = 8
    """Adapters installed between the same two steps of the engine."""
    waiting: int = 4096
    """Requests that wait for adapters."""
    timeout: float = 30.0
    """Seconds that a request waits, unless it says otherwise."""
    refusal: float = 10.0
    """Seconds for which an adapter that was refused is refused again without a look."""
    failure: float = 1.0
    """The same for one that could not be loaded by no fault of its own: a store that is gone is not asked by each request."""


@dataclass
class CacheMetrics:
    """Counters since the start, of requests and adapters. The disk tier has its own."""

    engine_hits: int = 0
    """Leases of what was in the engine."""
    memory_hits: int = 0
    """Leases that waited for a slot only."""
    cold: int = 0
    """Leases that waited for a load."""
    loads_from_disk: int = 0
    loads_from_store: int = 0
    refused_loads: int = 0
    """Adapters found unfit."""
    failed_loads: int = 0
    remembered_refusals: int = 0
    """Requests refused without a look."""
    timeouts: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    """Of successful loads, each from its start until it was in memory."""
    cold_seconds: float = 0.0
    """That cold leases waited, all together."""
    installs: int = 0
    engine_evictions: int = 0
    memory_evictions: int = 0
    memory_bytes: int = 0
    """Now."""


@dataclass(frozen=True)
class Residency:
    """What a replica has. A router that heard a later version of the same `life` may forget an earlier one."""

    life: str
    """Of this cache; another after a restart, when versions begin again."""
    version: int
    engine: frozenset[str]
    memory: frozenset[str]
    """The engine's included."""


@dataclass(eq=False)
class _Entry:
    digest: str
    wanted: int = 0
    """Leases, and requests that wait for one."""
    pinned: bool = False
    wished: bool = False
    """Prefetched: into memory, and into the engine if a slot is free."""
    loading: bool = False
    prepared: Prepared | None = None
    cost: float = 0.0
    """Seconds of its load."""
    resident: bool = False
    """In the engine, and not about to leave."""
    waiters: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def size(self) -> int:
        return self.prepared.size if self.prepared is not None else 0

    @property
    def kept(self) -> bool:
        return self.wanted > 0 or self.pinned


class AdapterCache:
    """
    Args:
        loads: reads and checks adapters; told each digest once at a time.
        engine: whose slots this cache alone fills.
        clock: seconds, by which loads are dear and refusals old.
    """

    def __init__(
        self,
        loads: Loads,
        engine: Slots,
        limits: CacheLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.limits, self.metrics = limits or CacheLimits(), CacheMetrics()
        self._loads, self._engine, self._clock = loads, engine, clock
        self._entries: dict[str, _Entry] = {}
        self._refused: OrderedDict[str, tuple[float, AdaptoryError]] = OrderedDict()
        self._to_load: OrderedDict[str, _Entry] = OrderedDict()
        self._arrived: list[tuple[_Entry, Loaded]] = []
        self._to_install: OrderedDict[str, _Entry] = OrderedDict()
        self._memory_worth, self._engine_worth = Worth(), Worth()
        self._loading = self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._placing: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._residency = Residency(secrets.token_hex(8), 0, frozenset(), frozenset())
        self._stopped: AdaptoryError | None = None

    # what a replica asks

    @contextlib.asynccontextmanager
    async def lease(self, digest: str, timeout: float | None = None) -> AsyncIterator[None]:
        """While the block runs, the adapter is in the engine. A caller that gives up does not end the load of others.

        Args:
            timeout: seconds to wait for it; None: as the limits say.

        Raises:
            AdapterError: it was refused; the `check` says why.
            StoreError: it is not on this node, and the store cannot be read.
            AdapterLoadTimeout: it is on its way still.
            AdapterCacheFull: everything that could make room for it is in use, or too many wait.
            AdapterUnavailable: loading failed otherwise.
        """
        check_digest(digest)
        entry = self._entry(digest)
        entry.wanted += 1
        try:
            if entry.resident:
                self.metrics.engine_hits += 1
            else:
                await self._wait(entry, self.limits.timeout if timeout is None else timeout)
            self._memory_worth.use(digest, entry.cost, entry.size)
            self._engine_worth.use(digest, 1.0, 1.0)
            yield
        finally:
            entry.wanted -= 1
            self._settle(entry)

    def prefetch(self, digests: Iterable[str]) -> None:
        """Begin to load what a changed route will ask for: after what requests wait for, into slots that are free."""
        for digest in digests:
            check_digest(digest)
            entry = self._entry(digest)
            entry.wished = True
            self._advance(entry)
            self._settle(entry)

    def pin(self, digests: Collection[str]) -> None:
        """These never leave once they are here, and are loaded now; whatever was pinned before is not any more."""
        for digest in digests:
            check_digest(digest)
        for entry in list(self._entries.values()):
            if entry.pinned and entry.digest not in digests:
                entry.pinned = False
                self._settle(entry)
        for digest in digests:
            entry = self._entry(digest)
            entry.pinned = True
            self._advance(entry)

    @property
    def residency(self) -> Residency:
        return self._residency

    async def changed(self, version: int) -> Residency:
        """Wait until there is another version than this one."""
        while self._residency.version == version:
            await self._changed.wait()
        return self._residency

    async def close(self) -> None:
        """Whoever waits gets `EngineStopped`."""
        self._stop(EngineStopped("The replica is shut down.", hint="Ask another one."))
        tasks = [*self._tasks, *([self._placing] if self._placing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # requests

    def _entry(self, digest: str) -> _Entry:
        return self._entries.setdefault(digest, _Entry(digest))

    async def _wait(self, entry: _Entry, timeout: float) -> None:
        self._check_waiting(entry)
        cold, start = entry.prepared is None, self._clock()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry.waiters.add(waiter)
        self._waiting += 1
        self._advance(entry)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            self.metrics.timeouts += 1
            raise self._late(entry, timeout) from None
        finally:
            entry.waiters.discard(waiter)
            self._waiting -= 1
            if cold:
                self.metrics.cold_seconds += self._clock() - start
        self.metrics.cold += cold
        self.metrics.memory_hits += not cold

    def _check_waiting(self, entry: _Entry) -> None:
        if self._stopped is not None:
            raise copy.copy(self._stopped)
        until, error = self._refused.get(entry.digest, (0.0, None))
        if error is not None and self._clock() < until and entry.prepared is None:
            self.metrics.remembered_refusals += 1
            raise copy.copy(error)
        if self._waiting >= self.limits.waiting:
            raise AdapterCacheFull(
                f"{self._waiting} requests wait for adapters already.", hint="Ask again later.", adapter=entry.digest
            )

    def _late(self, entry: _Entry, timeout: float) -> AdapterUnavailable:
        facts = {"adapter": entry.digest, "seconds": timeout}
        if entry.prepared is None and not any(e is entry for e, _ in self._arrived):
            return AdapterLoadTimeout(
                f"The adapter {entry.digest} was not loaded within {timeout:g} s; it is on its way.",
                hint="Ask again.",
                **facts,
            )
        return AdapterCacheFull(
            f"The adapter {entry.digest} is loaded, and in {timeout:g} s nothing that is not in use could make room for it.",
            hint="Ask another replica, or raise its adapter slots or memory.",
            **facts,
        )

    # what happens next to an entry

    def _advance(self, entry: _Entry) -> None:
        """Have it loaded or installed, as far as that is not under way."""
        if entry.resident or entry.loading or self._stopped is not None:
            return
        if entry.prepared is not None:
            self._to_install[entry.digest] = entry
            self._place_soon()
            return
        self._to_load[entry.digest] = entry
        self._load_more()

    def _settle(self, entry: _Entry) -> None:
        """Somebody let go of it: others may get its room, and an entry without any content is forgotten."""
        if self._arrived or self._to_install:
            self._place_soon()
        idle = not (entry.kept or entry.loading or entry.wished)
        if idle and entry.prepared is None:
            self._to_load.pop(entry.digest, None)
            if self._entries.get(entry.digest) is entry:
                del self._entries[entry.digest]

    def _load_more(self) -> None:
        while self._to_load and self._loading < self.limits.loads:
            entry = next((e for e in self._to_load.values() if e.kept), None) or next(iter(self._to_load.values()))
            del self._to_load[entry.digest]
            entry.loading = True
            self._loading += 1
            task = asyncio.create_task(self._load(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _load(self, entry: _Entry) -> None:
        start = self._clock()
        try:
            loaded = await self._loads.load(entry.digest)
        except AdaptoryError as error:
            self._failed(entry, error)
        except Exception as error:
            log.exception("loading %s failed", entry.digest)
            what = f"The adapter {entry.digest} could not be loaded: {type(error).__name__}: {error}"
            self._failed(entry, AdapterUnavailable(what, adapter=entry.digest))
        else:
            entry.cost = self._clock() - start
            self.metrics.load_seconds += entry.cost
            self.metrics.loaded_bytes += loaded.size
            self.metrics.loads_from_store += loaded.from_store
            self.metrics.loads_from_disk += not loaded.from_store
            self._arrived.append((entry, loaded))  # it counts as loading until it has found room
            self._place_soon()

    def _failed(self, entry: _Entry, error: AdaptoryError) -> None:
        self._loaded(entry)
        self._refuse(entry, error)

    def _refuse(self, entry: _Entry, error: AdaptoryError) -> None:
        """Whoever waits for it is told, and whoever asks for a while."""
        refused = isinstance(error, AdapterError)
        self.metrics.refused_loads += refused
        self.metrics.failed_loads += not refused
        seconds = self.limits.refusal if refused else self.limits.failure
        self._refused[entry.digest] = self._clock() + seconds, error
        self._refused.move_to_end(entry.digest)
        while len(self._refused) > 1024:
            self._refused.popitem(last=False)
        entry.wished = False
        _tell(entry, error)
        self._settle(entry)
        if entry.pinned:  # a store comes back, a file is mended
            asyncio.get_running_loop().call_later(seconds, self._retry, entry)

    def _retry(self, entry: _Entry) -> None:
        if entry.pinned and self._entries.get(entry.digest) is entry:
            self._advance(entry)

    def _loaded(self, entry: _Entry) -> None:
        entry.loading = False
        self._loading -= 1
        self._load_more()

    def _stop(self, error: AdaptoryError) -> None:
        self._stopped = error
        for entry in self._entries.values():
            _tell(entry, error)

    # room: one task at a time

    def _place_soon(self) -> None:
        if self._placing is None and self._stopped is None:
            self._placing = asyncio.create_task(self._place())

    async def _place(self) -> None:
        """Go on while something can be done; whoever lets go of an adapter starts it again."""
        try:
            while await self._take_in() or await self._install():
                pass
        except AdaptoryError as error:
            self._stop(error)
        except Exception as error:  # a defect
            log.exception("adapters cannot be placed any more")
            self._stop(AdapterUnavailable(f"The replica can place no adapters: {type(error).__name__}: {error}"))
        finally:
            self._placing = None

    async def _take_in(self) -> bool:
        """Into memory, whatever of the arrived finds room; whether any did."""
        for number, (entry, loaded) in enumerate(self._arrived):
            victims = self._memory_victims(loaded.size)
            if victims is None and entry.kept and loaded.size <= self.limits.memory:
                continue  # until somebody lets go
            del self._arrived[number]
            if victims is None:
                self._loaded(entry)
                entry.wished = False
                _tell(entry, self._too_large(entry, loaded.size))
                self._settle(entry)
                return True
            if resident := [victim for victim in victims if victim.resident]:
                await self._swap([], resident)
            for victim in victims:
                if not (victim.kept or victim.resident):  # it may be wanted again since
                    self._drop(victim)
            self._publish()
            if self.metrics.memory_bytes + loaded.size > self.limits.memory:
                self._arrived.insert(0, (entry, loaded))
                return True
            entry.prepared = loaded.prepared
            self.metrics.memory_bytes += loaded.size
            self._memory_worth.use(entry.digest, entry.cost, entry.size)
            self._loaded(entry)
            self._to_install[entry.digest] = entry
            self._publish()
            return True
        return False

    async def _install(self) -> bool:
        """Into the engine, in the order of asking, as many as a swap takes; whether anything was done."""
        batch: list[_Entry] = []
        victims: list[_Entry] = []
        free = self.limits.slots - sum(e.resident for e in self._entries.values())
        spare = self._engine_victims()
        for entry in list(self._to_install.values()):
            if len(batch) == self.limits.swaps:
                break
            if entry.kept and free <= 0 and spare:
                victims.append(spare.pop(0))
                free += 1
            if free > 0 and (entry.kept or entry.wished):
                batch.append(entry)
                free -= 1
            elif entry.kept:
                continue  # until somebody lets go
            del self._to_install[entry.digest]
            entry.wished = False
        if not batch:
            return False
        await self._swap(batch, victims)
        return True

    async def _swap(self, install: list[_Entry], remove: list[_Entry]) -> None:
        for victim in remove:
            victim.resident = False  # from now on whoever asks for it waits
        self._publish()
        prepared = {entry.digest: entry.prepared for entry in install if entry.prepared is not None}
        try:
            await self._engine.swap_adapters(prepared, [victim.digest for victim in remove])
        except AdapterInUse:  # a request whose lease has ended is still being removed from the engine
            for victim in remove:
                self._has_come(victim)  # and counts as used: another shall go in its place
            self._to_install = OrderedDict({entry.digest: entry for entry in install}) | self._to_install
            self._publish()
            await asyncio.sleep(0.01)
            return
        except AdapterError as error:  # the engine cannot serve one of them, so it has changed nothing
            if not any(entry.digest == error.context.get("adapter") for entry in install):
                raise
            for victim in remove:
                self._has_come(victim)
            for entry in install:
                if entry.digest == error.context["adapter"]:
                    self._drop(entry)
                    self._refuse(entry, error)
                else:
                    self._to_install[entry.digest] = entry
            self._publish()
            return
        for victim in remove:
            self.metrics.engine_evictions += 1
            self._engine_worth.evicted(victim.digest)
        for entry in install:
            self._has_come(entry)
        self.metrics.installs += len(install)
        self._publish()

    def _has_come(self, entry: _Entry) -> None:
        entry.resident = True
        self._to_install.pop(entry.digest, None)  # asked for again meanwhile
        self._engine_worth.use(entry.digest, 1.0, 1.0)
        _tell(entry, None)

    def _engine_victims(self) -> list[_Entry]:
        free = [e.digest for e in self._entries.values() if e.resident and not e.kept]
        return [self._entries[digest] for digest in self._engine_worth.cheapest(free)]

    def _memory_victims(self, size: int) -> list[_Entry] | None:
        """What must leave memory so that this fits; None if too little can."""
        over = self.metrics.memory_bytes + size - self.limits.memory
        candidates = [e.digest for e in self._entries.values() if e.prepared is not None and not e.kept]
        victims: list[_Entry] = []
        for digest in self._memory_worth.cheapest(candidates):
            if over <= 0:
                break
            victims.append(self._entries[digest])
            over -= self._entries[digest].size
        return victims if over <= 0 else None

    def _drop(self, entry: _Entry) -> None:
        self.metrics.memory_bytes -= entry.size
        self.metrics.memory_evictions += 1
        self._memory_worth.evicted(entry.digest)
        entry.prepared, entry.wished = None, False
        self._to_install.pop(entry.digest, None)
        self._settle(entry)

    def _too_large(self, entry: _Entry, size: int) -> AdapterCacheFull:
        return AdapterCacheFull(
            f"The adapter {entry.digest} takes {size:,} bytes; the memory tier has {self.limits.memory:,}.",
            hint="Give the replica more memory for adapters.",
            adapter=entry.digest,
        )

    def _publish(self) -> None:
        engine = frozenset(e.digest for e in self._entries.values() if e.resident)
        memory = frozenset(e.digest for e in self._entries.values() if e.prepared is not None)
        now = self._residency
        if (engine, memory) != (now.engine, now.memory):
            self._residency = Residency(now.life, now.version + 1, engine, memory)
            self._changed.set()
            self._changed = asyncio.Event()


def _tell(entry: _Entry, error: AdaptoryError | None) -> None:
    """Everyone gets an error of their own: a traceback grows each time one is raised."""
    for waiter in entry.waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(copy.copy(error))
