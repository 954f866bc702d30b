"""How much of prompts is read in a step beside answers, so that nobody's next token is long in coming.

A step of 512 tokens of a model with 135M parameters takes 2.3 s on two AVX2 cores in float32, and far less elsewhere: how long it takes
here is seen from the steps themselves.
"""

from __future__ import annotations

LEAST = 64
"""Tokens of prompts in a step at least: for fewer, reading the weights is most of the work."""

_NEWEST = 0.3
"""What the last step counts beside those before it."""


class PromptPace:
    """
    Args:
        seconds: that a step may take in which answers go on and prompts are read; None: however long it takes.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._each: float | None = None  # seconds for a token

    def tokens(self, answering: int) -> int | None:
        """Of prompts in the next step; None: as many as there are. Until a step has shown how long they take, the least.

        Args:
            answering: tokens of answers that the step computes beside them; none waits where there are none.
        """
        if self._seconds is None or not answering:
            return None
        return LEAST if self._each is None else max(LEAST, int(self._seconds / self._each) - answering)

    def took(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long. That of a few says nothing: reading the weights is most of it."""
        if tokens >= LEAST:
            each = seconds / tokens
            self._each = each if self._each is None else _NEWEST * each + (1 - _NEWEST) * self._each
