"""Which replica answers: one that has the request's adapter, else the one whose turn it is by rendezvous hashing.

Runs inside Serve's handles, in the gateways. What each replica has comes by Serve's routing stats: each replica tells the
controller, which tells all handles (`RESIDENCY_SECONDS`). Rendezvous hashing (Thaler and Ravishankar, 1998) needs no feed:
all gateways send a cold adapter to the same replica, and when a replica comes or goes only its own adapters move.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serving.engine.protocol import GenerateRequest
from serving.residency import remember

RESIDENCY_SECONDS = 0.5
"""Between two looks at what a replica has."""


def ranked(
    adapter: str | None,
    replicas: Sequence[str],
    residency: Mapping[str, Mapping[str, Collection[str]]],
    busy: Callable[[str], bool],
    refused: Collection[str] = frozenset(),
) -> list[list[str]]:
    """Replicas in the order of preference; those of one group are equally good.

    A replica with a full batch comes after all others, so that an adapter which many ask for spreads instead of keeping
    one replica busy and the others idle (ray#65691). One that has turned the request away comes last.

    Args:
        residency: of each replica the digests in its `engine` and its `memory`.
        refused: those that have turned the request away.
    """
    if refused:
        willing = [r for r in replicas if r not in refused]
        return [*ranked(adapter, willing, residency, busy), [r for r in replicas if r in refused]]
    if adapter is None:
        shuffled = random.sample(replicas, len(replicas))
        return [group for group in ([r for r in shuffled if not busy(r)], [r for r in shuffled if busy(r)]) if group]

    def has(replica: str, tier: str) -> bool:
        return adapter in residency.get(replica, {}).get(tier, ())

    order = sorted(replicas, key=lambda replica: _weight(adapter, replica), reverse=True)
    in_engine = [r for r in order if has(r, "engine") and not busy(r)]
    in_memory = [r for r in order if has(r, "memory") and not has(r, "engine") and not busy(r)]
    cold = [[r] for r in order if not has(r, "memory") and not busy(r)]
    full = [r for r in order if busy(r)]
    return [group for group in (in_engine, in_memory, *cold, full) if group]


def _weight(adapter: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{adapter} {replica}".encode(), digest_size=8).digest()


class AdapterRouter(RequestRouter):
    """`ranked`, as Serve asks for it."""

    def initialize_state(self, **kwargs: Any) -> None:
        """
        Args:
            kwargs: `full_batch`, the requests on a replica with which its batch is full.
        """
        self._full_batch: int = kwargs["full_batch"]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called when a replica comes or goes, and when one has told something new."""
        super().update_replicas(replicas)
        remember(self._deployment_id.name, {replica.replica_id.unique_id: _told(replica) for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        residency = {name: _told(replica) for name, replica in by_name.items()}
        adapter, refused = _asked(pending_request)

        def busy(name: str) -> bool:
            length = self.replica_queue_len_cache.get(by_name[name].replica_id)
            return length is not None and length >= self._full_batch

        groups = ranked(adapter, list(by_name), residency, busy, refused)
        return [[by_name[name] for name in group] for group in groups]


def _told(replica: RunningReplica) -> dict[str, Any]:
    return replica.routing_stats or {}


def _asked(pending: PendingRequest | None) -> tuple[str | None, frozenset[str]]:
    """The adapter that is asked for, and the replicas that have turned the request away."""
    if pending is None:
        return None, frozenset()
    for argument in pending.args:
        if isinstance(argument, GenerateRequest):
            return argument.adapter, argument.refused_by
    return pending.kwargs.get("adapter"), frozenset()
