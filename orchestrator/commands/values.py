"""Values as people write them on a command line."""

from __future__ import annotations

import re
import time
from datetime import datetime

import typer

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])")
_LONGEST = 100 * 365 * 86400.0


def seconds(text: str) -> float:
    """`90s`, `30m`, `12h`, `90d` or `2w` → seconds."""
    match = _DURATION.fullmatch(text)
    found = float(match[1]) * _UNITS[match[2]] if match else None
    if found is None or found > _LONGEST:
        raise typer.BadParameter(f"{text!r} is no duration; write 90s, 30m, 12h, 90d or 2w, at most a hundred years.")
    return found


def moment_of(text: str) -> float:
    """A duration before now, or a local date or time (`2026-11-22`, `2026-11-22T05:10`) → seconds since the epoch."""
    if _DURATION.fullmatch(text):
        return time.time() - seconds(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text!r} is no time; write 24h, 7d, 2026-11-22 or 2026-11-22T05:10.") from error


def limit(text: str) -> int | None:
    """A number, or `none` for without limit."""
    if text.lower() == "none":
        return None
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 2**31:
        raise typer.BadParameter(f"{text!r} is no limit; write a number from 0 to {2**31 - 1:,}, or none.")
    return int(text)
