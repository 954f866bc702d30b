"""A base model's tokenizer, and a conversation as the text after which the model is to answer: for training, evaluation, serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import ModelError
from orchestrator.modeling import light_transformers

Message = Mapping[str, Any]
"""OpenAI's form: `role`, `content`, and what tools add; a training row may have a `weight`, which no template sees."""


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a base model's directory; no code of the model is run.

    Raises:
        ModelError: there is none that can be loaded.
    """
    light_transformers.prepare()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and tokenizers' bare Exception
        raise ModelError(
            f"The tokenizer in {directory} cannot be loaded: {(str(error).strip() or repr(error)).splitlines()[0]}",
            hint="The directory needs tokenizer.json or the files it is made from.",
            model=str(directory),
        ) from error


def render(tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, answer_next: bool = True) -> str:
    """The tokenizer's chat template over a conversation, begin-of-text included.

    Args:
        answer_next: end with what precedes an answer (the template's generation prompt).

    Raises:
        jinja2.TemplateError, TypeError, ValueError: the template refuses the conversation, or there is none.
    """
    return tokenizer.apply_chat_template(
        for_template(messages), tools=tools, tokenize=False, add_generation_prompt=answer_next
    )


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Without what only training knows."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def prompt_ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """
    Args:
        text: what `render` wrote, which has the special tokens in it already.
        special: put those before it that the tokenizer begins a text with, for one that no template wrote.

    Raises:
        TypeError, UnicodeError: it holds half of a surrogate pair, which is no character.
    """
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """What ends a turn: the tokenizer's end of sequence and the template's end of turn."""
    names = [tokenizer.eos_token, "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]
    vocabulary = tokenizer.get_vocab()
    found = {vocabulary[name] for name in names if name in vocabulary}
    return frozenset(found) or frozenset({0})
