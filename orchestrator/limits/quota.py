"""A tenant's quota."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Limit = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Quota(BaseModel):
    """Each limit is None (without) or a number; 0 lets nothing through."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Tokens in and out together."""

    concurrent_requests: Limit | None = None
    """Requests being answered at the same time."""
