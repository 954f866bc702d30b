"""JSON answers: which tokens a grammar allows next. The only module that imports xgrammar, and not before it is needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import InvalidRequest
from serving.engine.protocol import JsonObject, JsonSchema, ResponseFormat

log = logging.getLogger(__name__)


class Grammars:
    """Compiles response formats for one tokenizer; compiled ones are kept. Slow for a large schema: not for the engine's thread.

    Args:
        vocab: width of the logits, which may exceed the tokenizer's vocabulary.
        end: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab: int, end: frozenset[int]):
        self._tokenizer, self.vocab, self._end = tokenizer, vocab, end
        self._compiler: Any = None
        self._lock = threading.Lock()

    def matcher(self, format: ResponseFormat) -> GrammarState:
        """
        Raises:
            InvalidRequest: xgrammar is not installed, or refuses the schema.
        """
        try:
            import xgrammar
        except ImportError as error:
            raise InvalidRequest(
                "JSON answers need xgrammar, which is not installed.",
                hint="Install it where the engine runs: pip install 'adaptory[json]'.",
            ) from error
        with self._lock:
            if self._compiler is None:
                info = xgrammar.TokenizerInfo.from_huggingface(
                    self._tokenizer, vocab_size=self.vocab, stop_token_ids=sorted(self._end)
                )
                self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE)
            try:
                match format:
                    case JsonObject():
                        compiled = self._compiler.compile_json_schema('{"type": "object"}')
                    case JsonSchema(schema=schema):
                        compiled = self._compiler.compile_json_schema(schema)
            except (RuntimeError, ValueError) as error:
                raise InvalidRequest(
                    f"response_format.schema cannot be used: {str(error).strip().splitlines()[-1]}",
                    field="response_format.schema",
                ) from error
        return GrammarState(xgrammar.GrammarMatcher(compiled), self.vocab)


_CACHE = 256 * 2**20


class GrammarState:
    """How far one answer has come."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher = matcher
        self._allowed = torch.full((1, -(-vocab // 32)), -1, dtype=torch.int32)

    def allowed(self) -> Tensor:
        """[vocab / 32] int32; bit n % 32 of number n // 32 says whether token n may come next.

        None may where the matcher fails: that ends its own request, not the step.
        """
        self._allowed.fill_(-1)
        try:
            self._matcher.fill_next_token_bitmask(self._allowed)
        except (RuntimeError, ValueError):
            log.exception("a grammar failed")
            self._allowed.zero_()
        return self._allowed[0]

    def accept(self, token: int) -> None:
        assert self._matcher.accept_token(token), "the token was chosen among those allowed"


def forbid(logits: Tensor, rows: Sequence[int], states: Sequence[GrammarState]) -> None:
    """Put every token that a row's grammar forbids to -inf, in place: logits [answers, vocab]."""
    bits = torch.stack([state.allowed() for state in states]).to(logits.device)
    allowed = (bits[:, :, None] >> torch.arange(32, device=logits.device, dtype=torch.int32)) & 1
    allowed = allowed.flatten(1)[:, : logits.shape[1]].bool()
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill(~allowed, float("-inf"))
