"""From a request's words to the tokens that the engine reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from orchestrator.errors import InvalidRequest
from orchestrator.modeling import prompts


class Prompts:
    """Renders with one base model's tokenizer and chat template. Safe from several threads.

    Args:
        tokenizer: of transformers.
        longest: tokens of prompt and answer together that the engine holds.
    """

    def __init__(self, tokenizer: Any, longest: int):
        self._tokenizer, self.longest = tokenizer, longest

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """
        Raises:
            InvalidRequest: the base has no chat template, or it refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "This base model has no chat template.", hint="Ask it through /v1/completions.", field="messages"
            )
        try:
            text = prompts.render(self._tokenizer, messages)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}.",
                hint="Let user and assistant alternate, and leave the system message out if the model knows none.",
                field="messages",
            ) from error
        return self._checked(text, "messages")

    def text(self, text: str) -> tuple[int, ...]:
        """A text to go on from, as a tokenizer of this base begins one."""
        return self._checked(text, "prompt", special=True)

    def ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        return self._fitting(tuple(ids), "prompt")

    def _checked(self, text: str, field: str, special: bool = False) -> tuple[int, ...]:
        # A token has at least one byte of the text but for rare cases: what is far too long is not even tokenised.
        if len(text) > _CHARACTERS_PER_TOKEN * self.longest:
            raise self._too_long(f"{len(text):,} characters", field)
        try:
            ids = prompts.prompt_ids(self._tokenizer, text, special=special)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest(
                "The text holds half of a surrogate pair, which is no character.",
                hint="Send it as UTF-8.",
                field=field,
            ) from error
        return self._fitting(tuple(ids), field)

    def _fitting(self, ids: tuple[int, ...], field: str) -> tuple[int, ...]:
        if not ids:
            raise InvalidRequest("The prompt is empty.", field=field)
        if len(ids) >= self.longest:
            raise self._too_long(f"{len(ids):,} tokens", field)
        return ids

    def _too_long(self, length: str, field: str) -> InvalidRequest:
        return InvalidRequest(
            f"This model's context holds {self.longest:,} tokens, prompt and answer together; the prompt has {length}.",
            hint="Shorten it.",
            field=field,
            reason="context_length_exceeded",
        )


_CHARACTERS_PER_TOKEN = 64
