"""Loss falls on exactly what the assistant says and its end of turn, whatever the template. About four seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.data.files import Where
from jobs.data.formats import Conversation, Message
from jobs.data.render import Renderer, token_mask, tokenizer_digest
from orchestrator.errors import DataError, ModelError
from orchestrator.modeling.prompts import load_tokenizer

USER = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "The capital of France is Paris."}
USER_2, ANSWER_2 = {"role": "user", "content": "And of Italy?"}, {"role": "assistant", "content": "Rome."}
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}

END = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "marked_with_header": "<|im_end|>"}
END |= {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def conversation(*messages: Message, **rest: Any) -> Conversation:
    return Conversation(Where("f.jsonl", 7), list(messages), **rest)


def learned(tokenizer: Any, *messages: Message, **rest: Any) -> list[list[str]]:
    """For each example, the runs of tokens that carry loss, as text."""
    (examples,) = Renderer(tokenizer).tokens([conversation(*messages, **rest)])
    out = []
    for tokens in examples:
        assert tokens.ids.dtype == np.int32
        assert tokens.loss_mask.dtype == np.bool_
        borders = np.flatnonzero(np.diff(tokens.loss_mask)) + 1
        runs = zip(np.split(tokens.ids, borders), np.split(tokens.loss_mask, borders), strict=True)
        out.append([tokenizer.decode(run) for run, mask in runs if mask[0]])
    return out


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("family", sorted(END))
def test_each_answer_with_its_end_of_turn_and_nothing_else(
    make_tokenizer: Any, family: str, trim_offsets: bool
) -> None:
    tokenizer = make_tokenizer(family, trim_offsets=trim_offsets)
    runs = learned(tokenizer, USER, ANSWER, USER_2, ANSWER_2)
    assert runs == [[ANSWER["content"] + END[family], ANSWER_2["content"] + END[family]]]


@pytest.mark.parametrize("family", sorted(END))
def test_weight_zero_carries_no_loss(make_tokenizer: Any, family: str) -> None:
    runs = learned(make_tokenizer(family), USER, ANSWER | {"weight": 0}, USER_2, ANSWER_2)
    assert runs == [[ANSWER_2["content"] + END[family]]]
    runs = learned(make_tokenizer(family), USER, ANSWER, USER_2, ANSWER_2 | {"weight": 0})
    assert runs == [[ANSWER["content"] + END[family]]]


@pytest.mark.parametrize("family", sorted(END))
def test_the_ids_are_those_of_the_whole_rendering(make_tokenizer: Any, family: str) -> None:
    tokenizer, messages = make_tokenizer(family), [USER, ANSWER, USER_2, ANSWER_2]
    ((tokens,),) = Renderer(tokenizer).tokens([conversation(*messages)])
    assert tokens.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    question=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
    answer=st.text(st.characters(codec="utf-8"), max_size=30),
    family=st.sampled_from(["chatml", "marked", "marked_with_header"]),
    trim_offsets=st.booleans(),
)
def test_any_text_is_learned_from_its_first_to_its_last_token(
    make_tokenizer: Any, question: str, answer: str, family: str, trim_offsets: bool
) -> None:
    """What is trained is what is generated: the prompt's tokens, then the answer's.

    The answer begins with a letter here: one that begins with a line break may share a token with the header's.
    """
    tokenizer = make_tokenizer(family, trim_offsets=trim_offsets)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A" + answer}]
    ((tokens,),) = Renderer(tokenizer).tokens([conversation(*messages)])
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    expected = tokenizer.encode("A" + answer + "<|im_end|>", add_special_tokens=False)
    assert tokens.ids[~tokens.loss_mask].tolist()[: len(prompt)] == prompt
    assert tokens.ids[tokens.loss_mask].tolist() == expected


def test_white_space_at_the_borders_of_an_answer(make_tokenizer: Any) -> None:
    """Trimmed offsets report white space as empty ranges, which must fall on the right side of the border."""
    answer = {"role": "assistant", "content": "Paris \n\n"}
    for trim_offsets in (False, True):
        tokenizer = make_tokenizer("chatml", trim_offsets=trim_offsets)
        assert learned(tokenizer, USER, answer) == [["Paris \n\n<|im_end|>"]]


def test_token_mask_by_hand() -> None:
    offsets = [(0, 3), (3, 4), (4, 7), (7, 9), (8, 9), (9, 9), (9, 12)]
    assert token_mask(offsets, [(4, 9)]).tolist() == [False, False, True, True, True, True, False]
    assert token_mask([(0, 5), (5, 8)], [(4, 8)]).tolist() == [
        False,
        True,
    ]  # the first also covers a header's character
    assert token_mask([(0, 3), (4, 4), (4, 6)], [(4, 6)]).tolist() == [
        False,
        False,
        True,
    ]  # a header's trimmed line break
    assert token_mask([], [(0, 1)]).tolist() == []


def test_a_template_that_rewrites_earlier_answers_gives_one_example_each(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("thinking")
    thought = "<think>\n\n</think>\n\n"
    runs = learned(tokenizer, USER, ANSWER, USER_2, ANSWER_2)
    assert runs == [[thought + ANSWER["content"] + "<|im_end|>"], [thought + ANSWER_2["content"] + "<|im_end|>"]]
    (examples,) = Renderer(tokenizer).tokens([conversation(USER, ANSWER, USER_2, ANSWER_2)])
    for tokens, messages in zip(examples, ([USER], [USER, ANSWER, USER_2]), strict=True):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokens.ids[: len(prompt)].tolist() == prompt  # as the model is asked when it is served


def test_a_template_whose_prompt_is_no_prefix_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"not begin as its own generation prompt.*f\.jsonl:7"):
        learned(make_tokenizer("unfaithful"), USER, ANSWER)


def test_tools_and_calls_go_through_the_template(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("chatml")
    asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "sunny"}
    runs = learned(tokenizer, USER, asked, result, ANSWER, tools=[WEATHER])
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'
    assert runs == [[written, ANSWER["content"] + "<|im_end|>"]]
    ((tokens,),) = Renderer(tokenizer).tokens([conversation(USER, ANSWER, tools=[WEATHER])])
    assert '"name": "weather"' in tokenizer.decode(tokens.ids[~tokens.loss_mask])


def test_a_template_that_drops_tools_or_calls_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="does not show tools"):
        learned(make_tokenizer("no_tools"), USER, ANSWER, tools=[WEATHER])
    with pytest.raises(ModelError, match="does not write tool calls"):
        learned(make_tokenizer("no_tools"), USER, {"role": "assistant", "content": "", "tool_calls": [CALL]})


def test_a_row_that_the_template_refuses_is_named(make_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:7: .*System role not supported") as caught:
        learned(make_tokenizer("gemma"), SYSTEM, USER, ANSWER)
    assert caught.value.context["line"] == 7


def test_no_chat_template(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(ModelError, match="no chat template") as caught:
        learned(tokenizer, USER, ANSWER)
    assert "instruction-tuned" in str(caught.value.hint)
    ((tokens,),) = Renderer(tokenizer).tokens([conversation(text="Rome is the capital of Italy.")])
    assert tokenizer.decode(tokens.ids) == "Rome is the capital of Italy.<|im_end|>"
    assert tokens.loss_mask.all()
    assert tokens.labelled == len(tokens.ids) - 1  # nothing predicts the first


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "slow-model"

    with pytest.raises(ModelError, match="slow-model has no fast version"):
        Renderer(Slow())


def test_a_directory_without_a_tokenizer(tmp_path: Path, make_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(make_tokenizer("chatml"))


def test_digest_changes_with_the_template(make_tokenizer: Callable[..., Any]) -> None:
    digests = {tokenizer_digest(make_tokenizer(family)) for family in ("chatml", "gemma", "llama3", None)}
    assert len(digests) == 4
    assert tokenizer_digest(make_tokenizer("chatml")) in digests
