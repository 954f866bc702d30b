"""Who holds which block of the key-value cache, and which blocks can be shared. Counting only: no tensors here.

A block holds the keys and values of `size` consecutive tokens. A full block never changes, so sequences that begin alike
may hold the same one. Its name is a hash chained over everything before it, that begins with the adapter's digest: what
one adapter computed is never given to another, nor to a new version of it (vllm#30931, vllm#42125).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


def root_name(adapter: str | None) -> bytes:
    """Where an adapter's chain begins."""
    return hashlib.sha256(f"adapter:{adapter}".encode() if adapter else b"base").digest()


def block_name(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full block. Cryptographic, since a collision would show one tenant's text to another."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Blocks 0 to `count - 1`: free, held by sequences, or unheld but kept in case that a later prompt begins alike.

    Args:
        count: blocks.
        size: tokens in a block.
        sharing: whether full blocks are kept and shared.
    """

    def __init__(self, count: int, size: int, sharing: bool = True):
        self.count, self.size, self.sharing = count, size, sharing
        self._free = deque(range(count))
        self._holders = [0] * count
        self._name: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # named, oldest first
        self._taken: list[int] = []

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._unheld)

    @property
    def held(self) -> int:
        return self.count - self.available

    def take(self, count: int) -> list[int]:
        """Blocks of undefined content; what was kept longest without use is given up first."""
        assert count <= self.available, "the scheduler asks for what is there"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._unheld.popitem(last=False)
                del self._named[self._name.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        self._taken += blocks
        return blocks

    def newly_taken(self) -> list[int]:
        """What `take` has given since this was last asked: to be cleared of what it held for others."""
        taken, self._taken = self._taken, []
        return taken

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The longest run of blocks by these names from the first on. They are not held yet: see `hold`."""
        found: list[int] = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of these `hold` would take away from what is available."""
        return sum(block in self._unheld for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._unheld.pop(block, None)
            self._holders[block] += 1

    def name(self, block: int, name: bytes) -> None:
        """A held block is full and can be shared. If its content stands in another block already, that one stays."""
        if self.sharing and name not in self._named and block not in self._name:
            self._named[name], self._name[block] = block, name

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a sequence's blocks; the last ones are the least likely to be shared, so they are reused first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._name:
                self._unheld[block] = None
            else:
                self._free.append(block)

    def releasable(self, blocks: Iterable[int]) -> int:
        """How many of these would become available if one of their holders gave them up."""
        return sum(self._holders[block] == 1 for block in blocks)

    def forget(self, blocks: Iterable[int]) -> None:
        """Never share these again: what they hold is not to be trusted."""
        for block in blocks:
            if name := self._name.pop(block, None):
                del self._named[name]
                if block in self._unheld:
                    del self._unheld[block]
                    self._free.append(block)
