"""A conversation as the tokens that the model will see, and which of them it is to learn."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from jobs.data.formats import Conversation, Message
from jobs.data.rows import Tokens
from orchestrator.errors import DataError, ModelError
from orchestrator.modeling import prompts

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""Half-open range of characters."""


@dataclass(frozen=True)
class Rendered:
    """A text and the parts of it that carry loss."""

    text: str
    spans: list[Span]


class Renderer:
    """Renders with a tokenizer's chat template; loss only on what the assistant says and on its end of turn.

    A template that marks the assistant's words (`{% generation %}`) is believed. With any other, an answer is what
    rendering up to and including it adds to rendering up to it with the generation prompt: exactly what the model has to
    produce when it is served. If the template writes an earlier answer differently once the conversation goes on (Qwen3
    strips its thoughts), that answer becomes an example of its own, as the model saw it when it was the last.

    Raises:
        ModelError: the tokenizer is not a fast one, which alone knows where in the text a token stands.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path
        if not tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer of {self.name} has no fast version.",
                hint="Convert it to tokenizer.json with AutoTokenizer.from_pretrained(…).save_pretrained(…).",
                model=self.name,
            )
        added = tokenizer.added_tokens_decoder.values()
        self._special = tuple({str(token) for token in added if token.special} | {tokenizer.eos_token} - {None})

    def tokens(self, batch: Sequence[Conversation]) -> list[list[Tokens]]:
        """The examples of each conversation: one, or several where the template rewrites earlier answers.

        Raises:
            DataError: the template refuses a row.
            ModelError: there is no chat template, or it cannot say which tokens are the assistant's.
        """
        rendered = [self.render(conversation) for conversation in batch]
        plain = [conversation.text is not None for conversation in batch]
        encoded: list[list[Tokens]] = [[] for _ in batch]
        for is_plain in set(plain):
            owners = [i for i, r in enumerate(rendered) if plain[i] == is_plain for _ in r]
            flat = [one for i, r in enumerate(rendered) if plain[i] == is_plain for one in r]
            encode = self._encode_plain if is_plain else self._encode
            for owner, tokens in zip(owners, encode(flat), strict=True):
                encoded[owner].append(tokens)
        return encoded

    def render(self, conversation: Conversation) -> list[Rendered]:
        """The texts of a conversation, with the spans that carry loss; none of them is empty."""
        if conversation.text is not None:
            return [Rendered(conversation.text, [(0, len(conversation.text))])]
        self._require_template(conversation)
        if conversation.tools:
            self._require_tools(conversation)
        rendered = self._by_markers(conversation) if self._marked else None
        rendered = rendered or self._by_prefixes(conversation)
        self._require_calls(conversation, rendered)
        return rendered

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The text after which the model is to answer."""
        return self._template(messages, tools, prompt=True)

    # --- spans ---

    def _by_prefixes(self, conversation: Conversation) -> list[Rendered]:
        messages = conversation.messages
        whole = self._checked(conversation, messages)
        spans: list[Span] = []
        rewritten: list[Rendered] = []
        for number, message in enumerate(messages):
            if not _learned(message):
                continue
            asked = self._checked(conversation, messages[:number], prompt=True)
            last = number == len(messages) - 1
            answered = whole if last else self._checked(conversation, messages[: number + 1])
            if not answered.startswith(asked):
                raise self._unusable(
                    "writes an answer that does not begin as its own generation prompt asks, so what is trained would not "
                    "be what is served",
                    conversation,
                )
            span = self._to_end_of_turn(answered, len(asked), len(answered))
            if whole.startswith(answered):
                spans.append(span)
            else:
                rewritten.append(Rendered(answered, [span]))
        return [*rewritten, Rendered(whole, spans)] if spans else rewritten

    def _by_markers(self, conversation: Conversation) -> list[Rendered] | None:
        """Spans by the template's own markers; None when they cannot be told apart by message weight."""
        try:
            # its annotation (-> str) is wrong: it returns the texts, and ranges of characters for each
            texts, marked = cast(Any, render_jinja_template)(
                [prompts.for_template(conversation.messages)],
                tools=conversation.tools,
                chat_template=self._chat_template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(conversation, error) from error
        spans = [(start, end) for start, end in marked[0] if end > start]
        learned = [_learned(m) for m in conversation.messages if m["role"] == "assistant"]
        if len(spans) != len(learned):
            return None
        text, header = texts[0], self._generation_prompt
        chosen = []
        for (start, end), wanted in zip(spans, learned, strict=True):
            start += len(header) if header and text.startswith(header, start) else 0  # some templates mark it as well
            if wanted:
                chosen.append(self._to_end_of_turn(text, start, end))
        return [Rendered(text, chosen)]

    def _to_end_of_turn(self, text: str, start: int, end: int) -> Span:
        """The span up to and with its end-of-turn token: neither the white space after it nor without it."""
        stripped = start + len(text[start:end].rstrip())
        if text.endswith(self._special, start, stripped):
            return start, stripped
        follows = max((token for token in self._special if text.startswith(token, end)), key=len, default="")
        return start, end + len(follows)

    # --- the template ---

    @functools.cached_property
    def _chat_template(self) -> str:
        return self.tokenizer.get_chat_template()

    @functools.cached_property
    def _marked(self) -> bool:
        return bool(_GENERATION_MARKER.search(self._chat_template))

    @functools.cached_property
    def _generation_prompt(self) -> str:
        question = [{"role": "user", "content": "?"}]
        without, with_prompt = (self._template(question, None, prompt=prompt) for prompt in (False, True))
        return with_prompt.removeprefix(without)

    def _template(self, messages: list[Message], tools: Any, *, prompt: bool = False) -> str:
        return prompts.render(self.tokenizer, messages, tools, answer_next=prompt)

    def _checked(self, conversation: Conversation, messages: list[Message], *, prompt: bool = False) -> str:
        try:
            return self._template(messages, conversation.tools, prompt=prompt)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _refused(conversation, error) from error

    def _require_template(self, conversation: Conversation) -> None:
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{self.name} has no chat template, and {conversation.where} is a conversation.",
                hint="Use the instruction-tuned version of the model, put a chat_template.jinja beside it, "
                'or train on plain text ({"text": …}).',
                model=self.name,
            )

    def _require_tools(self, conversation: Conversation) -> None:
        shown = self._checked(conversation, conversation.messages)
        if shown == self._template(conversation.messages, None):
            raise self._unusable("does not show tools", conversation)

    def _require_calls(self, conversation: Conversation, rendered: list[Rendered]) -> None:
        """Templates that know no tools leave calls out silently; the model would learn to say nothing."""
        said = "".join(one.text[start:end] for one in rendered for start, end in one.spans)
        for message in filter(_learned, conversation.messages):
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in said:
                    raise self._unusable("does not write tool calls", conversation)

    def _unusable(self, what: str, conversation: Conversation) -> ModelError:
        return ModelError(
            f"The chat template of {self.name} {what} ({conversation.where}).",
            hint="Use a model whose template does, or mark the assistant's words in its chat_template.jinja with "
            "{% generation %} … {% endgeneration %}.",
            model=self.name,
            file=conversation.where.file,
            line=conversation.where.line,
        )

    # --- tokens ---

    def _encode(self, texts: list[Rendered]) -> list[Tokens]:
        """The template has written begin-of-text itself, so no special token is added."""
        encoded = self.tokenizer(
            [one.text for one in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [Tokens(np.array(ids, np.int32), token_mask(offsets, one.spans)) for one, ids, offsets in pairs]

    def _encode_plain(self, texts: list[Rendered]) -> list[Tokens]:
        """Plain text: every token is learned, and then the end."""
        encoded = self.tokenizer([one.text for one in texts], return_attention_mask=False, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        ended = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]
        return [Tokens(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in ended]


def token_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens lie wholly inside a span; one that also covers a character of a header carries no loss.

    Args:
        offsets: [tokens] ranges of characters.
        spans: ranges of characters.

    Returns:
        bool[tokens]
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    # Byte-level tokenizers that trim offsets (Llama 3, GPT-2) report white space as an empty range at its end: it
    # really begins where the token before it ended.
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    mask = np.zeros(len(starts), bool)
    for start, end in spans:
        mask |= (starts >= start) & (ends <= end) & (ends > start)
    return mask


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over everything that decides which tokens a row becomes."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _refused(conversation: Conversation, error: Exception) -> DataError:
    where = conversation.where
    return DataError(
        f"{where}: the model's chat template refuses the row: {error}.",
        hint="Change the row (roles that alternate, no system message if the model knows none) or choose another model.",
        file=where.file,
        line=where.line,
    )
