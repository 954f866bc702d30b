"""What routing has to know of adapters, as one function: the registry has it (`registry.resolving`), and is handed in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from orchestrator.names import AdapterReference


@dataclass(frozen=True, slots=True)
class PreviousVersion:
    reference: str
    """`acme/intents@2`."""
    digest: str
    base_digest: str


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    digest: str
    base_digest: str
    previous: PreviousVersion | None = None
    """What an alias named before it came to this one; of a number or a digest, the version before it."""


Resolver = Callable[[Collection[AdapterReference]], Mapping[AdapterReference, ResolvedAdapter]]
"""Which adapters these references mean now; what does not exist is left out. A digest must be one of that name's own versions:
else a tenant could use another's adapter by its digest. Database errors pass through: they are no answer."""
