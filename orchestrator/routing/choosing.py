"""Which arm of a route a user gets: weighted rendezvous hashing, the same in every process and after every restart.

Each arm draws a number from the hash of (route, user, arm), scaled so that an arm wins with its share of the weights; the
highest wins (Schindelhauer and Schomaker, SPAA 2005). When a weight grows, users move to that arm only; none moves between
two others.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence

_RANGE = 2.0**64


def choose(route: str, user: str | None, arms: Sequence[tuple[str, int]]) -> int:
    """Index of the user's arm.

    Args:
        user: None: a request of nobody in particular, drawn anew each time.
        arms: (name, weight ≥ 1); the name is what keeps a user on it.
    """
    if len(arms) == 1:
        return 0
    who = secrets.token_hex(8) if user is None else user
    return max(range(len(arms)), key=lambda index: _score(route, who, *arms[index]))


def _score(route: str, user: str, arm: str, weight: int) -> float:
    # Lengths part the fields: else ("a", "bc") and ("ab", "c") were the same.
    text = f"{len(route)}:{route}{len(user)}:{user}{arm}".encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return -weight / math.log((drawn + 0.5) / _RANGE)
