"""From tokens to text that can be sent at once: no half characters, nothing that a stop text may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"
_HELD = 8  # tokens; a character has at most four bytes, so what is still broken then stays broken


class TextStream:
    """Text of one answer as it grows.

    A token's text depends on its neighbours (spaces, bytes of one character), so the tokens since the last whole piece are
    decoded with those before it, and what that adds is the new piece.

    Args:
        tokenizer: of transformers.
        stop: texts before the first of which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context = self._read = 0  # tokens from `context` to `read` are sent and give the next ones their context
        self._held = ""
        self.stopped = False
        """A stop text came up; nothing more is sent."""

    def push(self, token: int) -> str:
        """What can be sent now that this token is there."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._send(self._piece(), last=False)

    def end(self) -> str:
        """What is left when no token follows; bytes of an unfinished character are dropped."""
        if self.stopped:
            return ""
        return self._send(self._piece(final=True).rstrip(_BROKEN), last=True)

    def _piece(self, final: bool = False) -> str:
        sent = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        held = len(self._ids) - self._read
        if not final and (len(whole) <= len(sent) or (whole.endswith(_BROKEN) and held < _HELD)):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return whole[len(sent) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _send(self, piece: str, last: bool) -> str:
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else _overlap(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` with which one of the stops could begin."""
    return max(
        (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
    )
