"""What must not be shown, taken out of what is: applied where text of unknown origin leaves us (messages, crash files)."""

from __future__ import annotations

import re

API_KEY = re.compile(r"ak-([a-z2-7]{12})-([A-Za-z0-9_-]{43})")
"""An API key: public id, secret."""


def redact(text: str) -> str:
    """`text` with only the public part of each API key in it."""
    return API_KEY.sub(r"ak-\1-…", text)
