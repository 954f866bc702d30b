"""How many replicas an engine's deployment needs: by requests, and by tokens.

Runs in Serve's controller, into which it is pickled with all of this module: so nothing of ours is imported here. Serve itself
applies what the deployment's `AutoscalingConfig` says: bounds, delays, and the first replica of none (a request that waits in a
handle has it started at once).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FULL = 0.8
"""Of what a replica can hold: the share from which on another one is wanted."""

ROOM = 1.15
"""A replica goes when the others could take that much more than there is, so that none comes back in the next minute."""


class ByLoad:
    """A policy of Ray Serve's.

    Args:
        full_batch: requests that a replica answers at the same time.
        most_unread: tokens of prompts that may wait at a replica: what it reads within some seconds.
    """

    def __init__(self, full_batch: int, most_unread: int):
        self._full_batch, self._most_unread = full_batch, most_unread

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """
        Args:
            context: `ray.serve.config.AutoscalingContext`; its `aggregated_metrics` are what replicas told (`told`), means of
                the look-back period. They come without ids of adapters.
        """
        now = context.current_num_replicas
        if not now:  # none yet, or none any more: Serve starts the first for whoever waits
            return context.target_num_replicas, {}
        metrics = context.aggregated_metrics or {}
        need = self.need(context.total_num_requests, {name: list(by.values()) for name, by in metrics.items()})
        if need > now:
            return math.ceil(need), {}
        return min(now, math.ceil(need * ROOM)), {}

    def need(self, requests: float, told: Mapping[str, list[float]]) -> float:
        """Replicas, a fraction of them too; the scarcest decides.

        Args:
            requests: being answered, or waiting anywhere.
            told: of each figure, what the replicas told.
        """
        unread = sum(told.get("unread", ()))
        shares = [requests / (FULL * self._full_batch), unread / self._most_unread]
        capacity = told.get("cache_tokens", ())
        if each := sum(capacity) / max(1, len(capacity)):
            shares.append((sum(told.get("cache_tokens_used", ())) + unread) / (FULL * each))
        return max(shares)


def told(stats: Mapping[str, Any]) -> dict[str, float]:
    """What a replica tells of itself.

    Args:
        stats: of its engine, `serving.engine.protocol.EngineStats` as a dictionary.
    """
    return {
        "unread": stats["waiting_tokens"],
        "cache_tokens": stats["cache_tokens"],
        "cache_tokens_used": stats["cache_tokens_used"],
    }
