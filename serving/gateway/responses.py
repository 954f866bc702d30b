"""Answers as OpenAI's clients read them: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from serving.engine.protocol import TokenEvent, Usage

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """How one answer is written. Chunks of text are made from two halves that are written once: there is one a token."""

    kind: Literal["chat", "text"]
    model: str
    """As the request named it."""
    fingerprint: str | None
    """Of what answered: another one may say something else to the same seed."""
    include_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        object.__setattr__(self, "id", f"{prefix}-{secrets.token_hex(12)}")

    def whole(self, text: str, last: TokenEvent) -> dict[str, Any]:
        assert last.finish is not None
        assert last.usage is not None
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": last.finish.value}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._head(name) | {"choices": [choice], "usage": usage(last.usage)}

    def chunks(self) -> Callable[[TokenEvent], Iterator[bytes]]:
        """What to send for each event; `first` before them all."""
        marker = secrets.token_hex(8)
        before, after = self._chunk(marker, None).split(json.dumps(marker).encode())

        def write(event: TokenEvent) -> Iterator[bytes]:
            if event.text:
                yield before + json.dumps(event.text, ensure_ascii=False).encode() + after
            if event.finish is not None:
                yield self._chunk(None, event.finish.value)
                if self.include_usage and event.usage is not None:
                    yield _sse(self._head(self._chunk_name) | {"choices": [], "usage": usage(event.usage)})
                yield DONE

        return write

    def first(self) -> list[bytes]:
        """A chat's answer begins by saying who speaks."""
        return [self._chunk("", None, role=True)] if self.kind == "chat" else []

    def _chunk(self, text: str | None, finish: str | None, role: bool = False) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.kind == "chat":
            said = {} if text is None else {"content": text}
            choice["delta"] = ({"role": "assistant"} if role else {}) | said
        else:
            choice["text"] = text or ""
        return _sse(
            self._head(self._chunk_name) | {"choices": [choice]} | ({"usage": None} if self.include_usage else {})
        )

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def error_chunk(body: dict[str, Any]) -> bytes:
    """Ends a stream that cannot go on: OpenAI's clients raise it. No `[DONE]` follows."""
    return _sse(body)


def usage(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.prompt + used.completion,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
