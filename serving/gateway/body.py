"""Reads a request's JSON, with an end to how much and how slowly it may come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from orchestrator.errors import EngineOverloaded, InvalidRequest, RequestTimeout, RequestTooLarge
from serving.gateway.gateway import Arriving, Bounds

__all__ = ["ClientDisconnect", "read_json"]


async def read_json(request: Request, bounds: Bounds, arriving: Arriving) -> Any:
    """
    Raises:
        RequestTooLarge, RequestTimeout
        EngineOverloaded: too much of other bodies is here already.
        InvalidRequest: no JSON.
        ClientDisconnect
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > bounds.body_bytes:
        raise _too_large(bounds)
    data = bytearray()
    try:
        async with asyncio.timeout(bounds.body_seconds):
            async for part in request.stream():
                data += part
                arriving.bytes += len(part)
                if len(data) > bounds.body_bytes:
                    raise _too_large(bounds)
                if arriving.bytes > bounds.bodies_bytes:
                    raise EngineOverloaded("Too many requests are on their way in.", hint="Ask again later.")
    except TimeoutError as error:
        raise RequestTimeout(
            f"The body did not arrive within {bounds.body_seconds:g} s.", seconds=bounds.body_seconds
        ) from error
    finally:
        arriving.bytes -= len(data)
    try:
        # RecursionError: brackets in brackets. A number that JSON does not know (NaN) would come back out as one.
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("The body is not JSON.", hint="Send one JSON object, in UTF-8.") from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _too_large(bounds: Bounds) -> RequestTooLarge:
    return RequestTooLarge(
        f"The body has more than {bounds.body_bytes:,} bytes.", hint="Send less.", limit=bounds.body_bytes
    )
