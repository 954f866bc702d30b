"""Every failure in OpenAI's form: `{"error": {message, type, param, code}}`, with the status that its clients act on.

They retry 408, 409, 429 and 5xx by themselves, twice: so what asking again cannot mend has another status, or says
`x-should-retry: false`.
"""

from __future__ import annotations

import math
from typing import Any

from orchestrator import errors
from orchestrator.errors import AdaptoryError
from orchestrator.limits.buckets import Refused

INVALID, SERVER = "invalid_request_error", "server_error"

_STATUS: tuple[tuple[type[AdaptoryError], int, str], ...] = (
    (errors.InvalidRequest, 400, INVALID),
    (errors.InvalidName, 400, INVALID),
    (errors.ApiKeyRefused, 401, INVALID),
    (errors.ScopeMissing, 403, INVALID),
    (errors.ModelNotFound, 404, INVALID),
    (errors.RequestTimeout, 408, INVALID),
    (errors.RequestTooLarge, 413, INVALID),
    (errors.AdapterError, 424, INVALID),
    (errors.RateLimited, 429, "requests"),
    (errors.EngineOverloaded, 429, "requests"),
    (errors.GatewayDraining, 503, SERVER),
    (errors.ModelUnavailable, 503, SERVER),
    (errors.AdapterUnavailable, 503, SERVER),
    (errors.StoreError, 503, SERVER),
    (errors.DatabaseError, 503, SERVER),
    (errors.EngineStopped, 503, SERVER),
    (errors.ReplicaUnavailable, 503, SERVER),
)
"""The first that fits; whatever else goes wrong is ours: 500."""

OVERLOADED_RETRY = 1.0
"""Seconds after which to ask again when too many wait."""

DRAINING_RETRY = 5.0
"""Seconds after which to ask again, somewhere else or what comes next here."""


def status_of(error: Exception) -> int:
    return _found(error)[0]


def body_of(error: Exception) -> dict[str, Any]:
    """Nothing but the message of a typed error leaves: others may hold anything."""
    _, type = _found(error)
    if not isinstance(error, AdaptoryError):
        return _body("The server failed while it answered. Ask again.", SERVER, None, "internal_error")
    code = error.context.get("reason") or error.code
    if code == errors.AdapterError.code and "check" in error.context:
        code = f"{code}.{error.context['check']}"  # what it failed, which its owner can mend
    if isinstance(error, errors.RateLimited):
        type = error.context.get("kind", type)
    param = "model" if isinstance(error, errors.ModelNotFound) else error.context.get("field")
    return _body(said(error), type, param, code)


def said(error: AdaptoryError) -> str:
    """What a client is told. Where files and rows lie, and how to reach them, is the operator's affair; the log has it."""
    return next((text for kind, text in _INSTEAD if isinstance(error, kind)), str(error))


_INSTEAD: tuple[tuple[type[AdaptoryError], str], ...] = (
    (errors.StoreError, "The model's files cannot be read now. Ask again."),
    (errors.DatabaseError, "The request cannot be looked up now. Ask again."),
)


def headers_of(error: Exception) -> dict[str, str]:
    """When to ask again, or that it is no use; which check refused an adapter."""
    match error:
        case errors.RateLimited():
            seconds = error.context.get("retry_after")
            return _retry(seconds) if seconds is not None else {"x-should-retry": "false"}
        case errors.EngineOverloaded():
            return _retry(OVERLOADED_RETRY)
        case errors.GatewayDraining():
            return _retry(DRAINING_RETRY)
        case errors.ApiKeyRefused():
            return {"www-authenticate": "Bearer"}
        case errors.AdapterError() if check := error.context.get("check"):
            return {"x-adaptory-check": check}
    return {}


def limited(refused: Refused) -> AdaptoryError:
    """The error of a reservation that was refused."""
    kind = "tokens" if refused.limit == "tokens_per_minute" else "requests"
    return errors.RateLimited(
        str(refused), reason="rate_limit_exceeded", kind=kind, limit=refused.limit, retry_after=refused.retry_after
    )


def plain_body(status: int, message: str) -> dict[str, Any]:
    """Of an error without a type of ours: an unknown path, a wrong method."""
    return _body(
        message, INVALID if status < 500 else SERVER, None, {404: "unknown_url", 405: "method_not_allowed"}.get(status)
    )


def _found(error: Exception) -> tuple[int, str]:
    return next(((status, type) for kind, status, type in _STATUS if isinstance(error, kind)), (500, SERVER))


def _body(message: str, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _retry(seconds: float) -> dict[str, str]:
    """Whole seconds for all, milliseconds for OpenAI's clients."""
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
