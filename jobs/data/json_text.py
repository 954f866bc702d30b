"""JSON as data files hold it: what Python's own decoder would take silently, or end the program over, is refused in words."""

from __future__ import annotations

import json
from typing import Any

MOST_LEVELS = 100
"""Of lists and objects in each other. Rows have about six; Python's decoder, encoder and chat templates give up at some 500."""


class BadJson(ValueError):
    """Context for the caller, which knows the file.

    Args:
        at: index of the character, where it is known.
    """

    def __init__(self, what: str, hint: str, at: int | None = None):
        super().__init__(what)
        self.what, self.hint, self.at = what, hint, at


class _Repeated(Exception):
    """A name that an object holds twice; no ValueError, for the decoder's own must be told from it."""


def decode(text: str, at: int = 0) -> tuple[Any, int]:
    """The value that begins at `at`, and the index behind it.

    Raises:
        json.JSONDecodeError: broken, or not complete.
        BadJson: too deep, a repeated name, or a number of more digits than Python reads.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except _Repeated as error:
        raise BadJson(f"an object has {error} twice", "Only one of them would count: keep that.") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # of int(), above sys.get_int_max_str_digits()
        raise BadJson("a number has more than 4,300 digits", "Write it as text, in quotes.") from error
    if text.count("[", at, end) + text.count("{", at, end) > MOST_LEVELS and _deep(value):
        raise _too_deep()
    return value, end


def decode_whole(text: str) -> Any:
    """As `decode`, of a text that holds one value and white space."""
    begin = len(text) - len(text.lstrip(_BLANK))
    value, end = decode(text, begin)
    if rest := text[end:].lstrip(_BLANK):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


_BLANK = " \t\r\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(f"{name!r:.60}" for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _deep(value: Any) -> bool:
    level, deep = [value], 0
    while level and deep <= MOST_LEVELS:
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level, deep = [child for children in inner for child in children], deep + 1
    return bool(level)


def _too_deep() -> BadJson:
    return BadJson(f"values are nested more than {MOST_LEVELS} levels deep", "Flatten the row, or delete it.")
