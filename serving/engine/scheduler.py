"""Which tokens the next step computes. Plain bookkeeping, without tensors.

Every sequence has tokens (prompt and answer so far), of which the first `computed` are in the cache. A step computes some of
the others: the one last chosen while it answers, a chunk of many while its prompt is read. So decoding, chunked prefill,
shared prefixes and going on after a preemption are one thing. Decoding comes first; what is left of the step's token
budget reads prompts, oldest first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from serving.engine.blocks import BlockPool, block_name, root_name


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
    """Computed in one step at most: a long prompt delays others' next token by no more than this. Yet every answer that has
    begun gets its token in every step."""
    max_length: int = 8192
    """Tokens of prompt and answer together."""
    max_waiting: int = 1024
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
    prompt: int = field(init=False)
    """Tokens of the prompt."""
    computed: int = 0
    shared: int = 0
    """Prompt tokens that were found in the cache when it was first admitted."""
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""
    preempted: bool = False

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
    def __init__(self, limits: Limits):
        self.limits = limits
        self.pool = BlockPool(limits.blocks, limits.block_size, limits.share_prefixes)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def unread(self) -> int:
        """Tokens to be computed before all that was asked for can be answered. Any thread may ask: copying a list or a
        deque is one step for Python's threads."""
        reading = (missing for s in tuple(self.running) if (missing := s.missing) > 1)
        return sum(reading) + sum(s.missing for s in tuple(self.waiting))

    def plan(self) -> list[Work]:
        """Work of one step; the blocks it needs are taken. Empty when nothing waits and nothing runs."""
        budget = max(self.limits.batch_tokens, len(self.running))
        work: list[Work] = []
        preemptions = self.preemptions
        # what answers comes first and is preempted last; both in order of arrival
        queue = deque(sorted(self.running, key=lambda s: s.missing > 1))
        while queue and budget:
            sequence = queue.popleft()
            count = min(sequence.missing, budget)
            while not self._grow(sequence, count):
                victim = queue.pop() if queue else sequence
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                work.append(Work(sequence, count))
                budget -= count
        for sequence in self._admitted():
            if not budget or self.preemptions > preemptions:
                break
            count = min(sequence.missing, budget)
            if not self._admit(sequence, count):
                break
            count = min(sequence.missing, count)  # less when a prefix was found
            work.append(Work(sequence, count))
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

    def _admitted(self) -> Iterator[Sequence]:
        """Waiting sequences in order, while there is a place; the caller admits each before it asks for the next."""
        while self.waiting and len(self.running) < self.limits.max_sequences:
            yield self.waiting[0]

    def _admit(self, sequence: Sequence, count: int) -> bool:
        """Share what can be shared, and take a first chunk's blocks, if there is room for the whole sequence so far.

        One block more for each that runs stays free, or the next steps would preempt what this one admitted.
        """
        size = self.limits.block_size
        found: list[int] = []
        if self.pool.sharing:  # the last token is always computed: its logits are needed
            found = self.pool.find(sequence.block_names(size, (len(sequence.tokens) - 1) // size))
        needed = -(-len(sequence.tokens) // size) - len(found)
        if needed + len(self.running) > self.pool.available - self.pool.unheld(found):
            return False
        self.pool.hold(found)
        sequence.blocks, sequence.computed = found, len(found) * size
        if not sequence.preempted:
            sequence.shared = sequence.computed
        self.waiting.popleft()
        self.running.append(sequence)
        grown = self._grow(sequence, min(count, sequence.missing))
        assert grown, "counted above"
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
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
