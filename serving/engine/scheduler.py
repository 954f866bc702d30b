"""Which tokens the next step computes. Plain bookkeeping, without tensors.

Every sequence has tokens (prompt and answer so far), of which the first `computed` are in the cache. A step computes some of
the others: the one last chosen while it answers, a chunk of many while its prompt is read. So decoding, chunked prefill,
shared prefixes and going on after a preemption are one thing. Decoding comes first; what is left of the step's token
budget reads prompts, those of the tenant first that was served least (`serving.engine.fairness`).

A tenant that finds every place taken, or the cache full, gets half of its share of them at once, from tenants that have more than
theirs: else a flood of long answers would hold everybody back for as long as the longest of them. The other half comes
with the next places that get free: whoever loses one is computed again, which costs all more than that wait.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from serving.engine.blocks import BlockPool, block_name, root_name
from serving.engine.fairness import ANSWER_TOKEN, FairQueue
from serving.engine.pace import PromptPace


@dataclass(frozen=True)
class Limits:
    """Sizes of an engine."""

    cache_tokens: int = 32_768
    """Capacity of the key-value cache."""
    block_size: int = 32
    """Tokens in a block: what is shared is a multiple of it. Below 32, gathering a sequence costs more."""
    max_sequences: int = 64
    """Answered at the same time."""
    batch_tokens: int = 512
    """Computed in one step at most. Yet every answer that has begun gets its token in every step."""
    step_seconds: float | None = None
    """That a step may take in which answers go on: a long prompt delays others' next token by about this. None: however long
    `batch_tokens` take."""
    max_length: int = 8192
    """Tokens of prompt and answer together."""
    max_waiting: int = 1024
    """New requests that wait while no place is free, of all tenants."""
    max_adapters: int = 64
    share_prefixes: bool = True

    @property
    def blocks(self) -> int:
        return self.cache_tokens // self.block_size


@dataclass(eq=False)
class Sequence:
    """One request on its way through the engine."""

    tokens: list[int]
    adapter: str | None = None
    tenant: str = ""
    fetched: bool = False
    """As the request's."""
    prompt: int = field(init=False)
    """Tokens of the prompt."""
    computed: int = 0
    charged: int = 0
    """Tokens that its tenant was charged for: those that a preemption has computed again count once."""
    shared: int = 0
    """Prompt tokens that were found in the cache when it was first admitted."""
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""
    preempted: bool = False
    waits_since: float = 0.0
    """When it came to wait, in seconds of its queue's clock."""

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.computed

    def block_names(self, size: int, count: int) -> list[bytes]:
        """Names of the first `count` blocks, all full."""
        while len(self.names) < count:
            start = len(self.names) * size
            before = self.names[-1] if self.names else root_name(self.adapter)
            self.names.append(block_name(before, self.tokens[start : start + size]))
        return self.names[:count]


@dataclass(frozen=True)
class Work:
    """The next `count` tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def chooses(self) -> bool:
        """Whether the step computes the last token, so that the next can be chosen."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


class Scheduler:
    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self.pool = BlockPool(limits.blocks, limits.block_size, limits.share_prefixes)
        self.waiting = FairQueue(clock)
        self.running: list[Sequence] = []
        self.pace = PromptPace(limits.step_seconds)
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    @property
    def full(self) -> bool:
        """Whether as many wait as may, beside those for whom there is a place."""
        return self.room <= 0

    @property
    def room(self) -> int:
        """New requests that may still come. Any thread may ask."""
        new = self.waiting.new
        preempted = len(self.waiting) - new
        places = self.limits.max_sequences - len(self.running)
        return self.limits.max_waiting + max(places - preempted, 0) - new

    @property
    def unread(self) -> int:
        """Tokens to be computed before all that was asked for can be answered. Any thread may ask."""
        reading = (missing for s in tuple(self.running) if (missing := s.missing) > 1)
        return sum(reading) + sum(s.missing for s in self.waiting)

    def plan(self) -> list[Work]:
        """Work of one step; the blocks it needs are taken. Empty when nothing waits and nothing runs."""
        self._share_out()
        budget = max(self.limits.batch_tokens, len(self.running))
        work: list[Work] = []
        preemptions = self.preemptions
        # what answers comes first and is preempted last
        answering = deque(self._lightest_first(s for s in self.running if s.missing == 1))
        reading = deque(sorted((s for s in self.running if s.missing > 1), key=lambda s: self.waiting.served(s.tenant)))
        while answering:
            sequence = answering.popleft()
            if self._make_room(sequence, 1, answering, reading):
                work.append(self._charged(sequence, 1))
        budget -= len(work)
        if (bearable := self.pace.tokens(len(work))) is not None:
            budget = min(budget, bearable)
        while budget and (reader := self._reader(reading, admitting=self.preemptions == preemptions)):
            count = min(reader.missing, budget)
            if self._make_room(reader, count, answering, reading):
                work.append(self._charged(reader, count))
                budget -= count
        return work

    def advance(self, work: Work) -> None:
        """The step has computed these tokens; blocks that are full now can be shared."""
        sequence, size = work.sequence, self.limits.block_size
        before, sequence.computed = sequence.computed // size, sequence.computed + work.count
        after = sequence.computed // size
        if after > before and self.pool.sharing:
            for block, name in zip(
                sequence.blocks[before:after], sequence.block_names(size, after)[before:], strict=True
            ):
                self.pool.name(block, name)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """A sequence has ended, wherever it was.

        Args:
            forget: what it computed must not be shared.
        """
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if forget:
            self.pool.forget(sequence.blocks)
        self._release(sequence)

    def _reader(self, reading: deque[Sequence], *, admitting: bool) -> Sequence | None:
        """The next prompt to read: one that is being read, or one that waits if its tenant was served less."""
        first = self.waiting.first() if admitting and len(self.running) < self.limits.max_sequences else None
        if (
            first is not None
            and reading
            and self.waiting.served(reading[0].tenant) <= self.waiting.served(first.tenant)
        ):
            first = None
        if first is not None and self._fits(first):
            self._admit(first)
            return first
        return reading.popleft() if reading else None

    def _needs(self, sequence: Sequence) -> tuple[int, list[int]]:
        """Blocks that must be available to admit it, and those that it would share.

        There must be room for the whole sequence so far; and one block more for each that runs stays free, or the next
        steps would preempt what this one admitted.
        """
        size = self.limits.block_size
        found: list[int] = []
        if self.pool.sharing:  # the last token is always computed: its logits are needed
            found = self.pool.find(sequence.block_names(size, (len(sequence.tokens) - 1) // size))
        return -(-len(sequence.tokens) // size) - len(found) + self.pool.unheld(found) + len(self.running), found

    def _fits(self, sequence: Sequence) -> bool:
        return self._needs(sequence)[0] <= self.pool.available

    def _admit(self, sequence: Sequence) -> None:
        """Give it a place, and what can be shared."""
        _, found = self._needs(sequence)
        self.pool.hold(found)
        sequence.blocks, sequence.computed = found, len(found) * self.limits.block_size
        if not sequence.preempted:
            sequence.shared = sequence.computed
        self.waiting.take(sequence)
        self.running.append(sequence)

    def _charged(self, sequence: Sequence, count: int) -> Work:
        """Work that its tenant is charged for."""
        end, start = sequence.computed + count, max(sequence.computed, sequence.charged)
        if end > start:
            answer = max(end - max(start, sequence.prompt), 0)
            self.waiting.charge(sequence.tenant, end - start + (ANSWER_TOKEN - 1) * answer)
            sequence.charged = end
        return Work(sequence, count)

    # shares

    def _share_out(self) -> None:
        """Give those who wait with less than their share the places and blocks of those who have more."""
        while (first := self.waiting.first()) is not None:
            held = self._held()
            active = held.keys() | self.waiting.tenants
            share = 1 / len(active)
            if len(active) == 1 or self._ready(first) or not self._entitled(first, held, share):
                return
            victims = self._victims(first, held, share)
            if not victims:
                return
            for victim in victims:
                self._preempt(victim)
            self._admit(first)

    def _ready(self, sequence: Sequence) -> bool:
        return len(self.running) < self.limits.max_sequences and self._fits(sequence)

    def _held(self) -> dict[str, tuple[int, int]]:
        """Places and blocks of each tenant that has a place."""
        places = Counter(sequence.tenant for sequence in self.running)
        blocks = self._blocks()
        return {tenant: (places[tenant], blocks[tenant]) for tenant in places}

    def _blocks(self) -> Counter[str]:
        blocks: Counter[str] = Counter()
        for sequence in self.running:
            blocks[sequence.tenant] += len(sequence.blocks)
        return blocks

    def _entitled(self, sequence: Sequence, held: Mapping[str, tuple[int, int]], share: float) -> bool:
        """Whether its tenant would have no more than half of its share with it, or has no place at all."""
        places, blocks = held.get(sequence.tenant, (0, 0))
        needed = -(-len(sequence.tokens) // self.limits.block_size)
        return places == 0 or self._part(places + 1, blocks + needed) <= share / 2

    def _part(self, places: int, blocks: int) -> float:
        """Of the places or of the cache, whichever is more (dominant resource; Ghodsi et al., NSDI 2011)."""
        return max(places / self.limits.max_sequences, blocks / self.limits.blocks)

    def _victims(self, first: Sequence, held: dict[str, tuple[int, int]], share: float) -> list[Sequence]:
        """The youngest of those tenants that have more than their share, as few as make room; none if that is not enough."""
        running, free = list(self.running), self.pool.available
        needed = self._needs(first)[0]
        victims: list[Sequence] = []
        while len(running) >= self.limits.max_sequences or needed > free:
            tenant = max(held, key=lambda t: self._part(*held[t]))
            places, blocks = held[tenant]
            if places < 2 or self._part(places, blocks) <= share:
                return []
            victim = next(sequence for sequence in reversed(running) if sequence.tenant == tenant)
            running.remove(victim)
            victims.append(victim)
            held[tenant] = places - 1, blocks - len(victim.blocks)
            free += self.pool.releasable(victim.blocks)
            needed -= 1
        return victims

    # blocks

    def _lightest_first(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those of the tenants first that hold the fewest blocks; of one tenant, in order of arrival."""
        blocks = self._blocks()
        return sorted(sequences, key=lambda sequence: blocks[sequence.tenant])

    def _make_room(self, sequence: Sequence, count: int, *others: deque[Sequence]) -> bool:
        """Blocks for `count` tokens more; False when it had to give up its place itself.

        Args:
            others: whose turn in this step is yet to come. The youngest of the tenant that holds most gives way.
        """
        while not self._grow(sequence, count):
            victim = self._lightest_first([sequence, *itertools.chain(*others)])[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
            next(queue for queue in others if victim in queue).remove(victim)
        return True

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` tokens more; False when there are too few."""
        needed = -(-(sequence.computed + count) // self.limits.block_size) - len(sequence.blocks)
        if needed > self.pool.available:
            return False
        if needed > 0:
            sequence.blocks += self.pool.take(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Its blocks go to others; it waits in front, to be computed again from its tokens."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preempted = True
        self.preemptions += 1
        self.waiting.put_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
