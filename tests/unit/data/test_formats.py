"""Every row format becomes one shape; what is wrong with a row is said with its line. Under a second."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from jobs.data.files import Where
from jobs.data.formats import Conversation, conversations
from orchestrator.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TIME = datetime.datetime(2026, 1, 2)


def called(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


WEATHER = {"name": "weather", "parameters": {"type": "object"}}


def convert(*rows: dict[str, Any], format: str = "auto") -> list[tuple[Conversation, str]]:
    return list(conversations([(row, Where("f.jsonl", n)) for n, row in enumerate(rows, 1)], format))


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, "chat", [SYSTEM, USER, ANSWER]),
        ({"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]}, "chat", [SYSTEM, USER, ANSWER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]}, "chat", [USER, ANSWER]),
        ({"messages": '[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]'}, "chat", [USER, ANSWER]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "prompt_completion", [SYSTEM, USER, ANSWER]),
        ({"instruction": "q", "output": "a"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", [{"role": "user", "content": "q\n\ni"}, ANSWER]),
        ({"instruction": "q", "output": "a", "system": "s"}, "alpaca", [SYSTEM, USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            [SYSTEM, USER, ANSWER],
        ),
        ({"conversations": [USER, ANSWER]}, "sharegpt", [USER, ANSWER]),
        ({"input": "q", "ideal": "a"}, "input_ideal", [USER, ANSWER]),
        ({"input": [SYSTEM, USER], "ideal": ["a", "b"]}, "input_ideal", [SYSTEM, USER, ANSWER]),
    ],
)
def test_formats_are_recognised_and_made_one(row: dict[str, Any], format: str, messages: list[Any]) -> None:
    ((conversation, found),) = convert(row | {"an unused column": None})
    assert found == format
    assert conversation.messages == messages
    assert convert(row, format=format)[0][0] == conversation


def test_plain_text() -> None:
    ((conversation, found),) = convert({"text": "t"})
    assert (found, conversation.text, conversation.messages) == ("text", "t", [])


def test_weights_are_kept_and_context_is_not_learned() -> None:
    skipped = ANSWER | {"weight": 0}
    ((chat, _), (weighted, _)) = convert(
        {"messages": [USER, skipped, USER, ANSWER | {"weight": 1}]}, {"messages": [USER, ANSWER, USER, ANSWER]}
    )
    assert chat.messages == [USER, skipped, USER, ANSWER]
    assert weighted.messages == [USER, ANSWER, USER, ANSWER]
    ((context, _),) = convert({"prompt": [USER, ANSWER, USER], "completion": "a"})
    assert context.messages == [USER, skipped, USER, ANSWER]


def test_tools_and_calls_have_one_shape() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c1", "content": "sunny"}, ANSWER]
    ((conversation, _),) = convert({"messages": messages, "tools": [{"type": "function", "function": WEATHER}]})
    assert conversation.tools == [{"type": "function", "function": WEATHER}]
    assert conversation.messages[1]["content"] == ""
    assert conversation.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert conversation.messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "a"},
    ]
    ((sharegpt, _),) = convert({"conversations": turns, "tools": f"[{WEATHER}]".replace("'", '"')})
    assert sharegpt.tools == conversation.tools
    assert sharegpt.messages[1]["tool_calls"][0]["function"] == conversation.messages[1]["tool_calls"][0]["function"]


GOOD = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "no answer (completion)"),
        ({"prompt": "q", "completion": None}, "no answer (completion)"),
        ({"prompt": "q", "completion": "  "}, "no answer (completion)"),
        ({"prompt": "q", "completion": 3}, "completion is 3, not text"),
        ({"messages": [USER, ANSWER]}, "mixed formats: this row is chat, the rows before it are prompt_completion"),
        ({"question": "q", "answer": "a"}, "keys (question, answer) are those of no known format"),
        ({}, "keys (none)"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "DPO"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "DPO"),
    ],
)
def test_a_later_row_that_is_wrong_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(GOOD, row)
    assert caught.value.message.startswith("f.jsonl:2: ")
    assert message in caught.value.message
    assert (caught.value.context["file"], caught.value.context["line"]) == ("f.jsonl", 2)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "no answer (messages)"),
        ({"messages": []}, "no list of messages"),
        ({"messages": "[broken"}, "messages is broken JSON"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "no answer"),
        ({"messages": [USER, ANSWER, USER]}, "no answer"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "every assistant message has weight 0"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "messages[1].weight is 0.5"),
        ({"messages": [ANSWER]}, "begins with the assistant"),
        ({"messages": [{"role": "bot", "content": "q"}, ANSWER]}, "messages[0].role is 'bot'"),
        ({"messages": ["q", ANSWER]}, "messages[0] is 'q', not a message"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "messages[0].content is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "a part of type image_url"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "tool_calls[0] names no function"),
        ({"messages": [USER, ANSWER], "tools": "x"}, "tools is broken JSON"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "no answer (conversations)"),
        ({"conversations": [{"from": "narrator", "value": "q"}]}, "role is 'narrator'"),
        ({"instruction": "q"}, "no answer (output)"),
        ({"input": "q", "ideal": []}, "no answer (ideal)"),
        ({"text": " "}, "the text is empty"),
        ({"messages": [{"role": ["user"], "content": "q"}, ANSWER]}, "messages[0].role is ['user']"),
        ({"messages": [{"role": {}, "content": "q"}, ANSWER]}, "messages[0].role is {}"),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, "conversations[0].role is ['human']"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": 5}]}, "messages[1].tool_calls is 5, not a list"),
        ({"messages": [USER, called(5)]}, "tool_calls[0].function.arguments is 5, not an object"),
        ({"messages": [USER, called("[1]")]}, "tool_calls[0].function.arguments is [1], not an object"),
        (
            {"messages": [USER, called({"at": TIME})]},
            "tool_calls[0].function.arguments.at is datetime.datetime(2026, 1, 2",
        ),
        ({"messages": [USER, ANSWER], "tools": [{"function": 5}]}, "tools is no list of objects"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f", "since": TIME}]}, "tools[0].function.since is datetime"),
        ({"messages": [USER, ANSWER], "tools": "[" * 3000 + "]" * 3000}, "in tools, values are nested more than 100"),
        ({"messages": [USER, ANSWER], "tools": '[{"a": 1, "a": 2}]'}, "in tools, an object has 'a' twice"),
        ({"messages": [USER, ANSWER], "tools": f'[{{"a": {"9" * 5000}}}]'}, "a number has more than 4,300 digits"),
        ({"prompt": None, "completion": "a"}, "prompt is null"),
        ({"text": None}, "text is null"),
        ({"text": "\ud800"}, "text holds half of a surrogate pair"),
        ({"prompt": "q", "completion": "a\udc00b"}, "messages[1].content holds half of a surrogate pair"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f", "\ud800": 1}]}, "tools[0].function holds half"),
        ({"chosen": "a", "rejected": "b"}, "DPO"),
    ],
)
def test_a_first_row_that_is_wrong_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(row)
    assert message in caught.value.message
    assert caught.value.context["line"] == 1


def test_a_named_format_is_not_guessed() -> None:
    both = {"text": "t", "prompt": "q", "completion": "a"}
    assert convert(both, format="text")[0][0].text == "t"
    with pytest.raises(DataError, match=r"this row is chat, data\.format names text") as caught:
        convert({"messages": [USER, ANSWER]}, format="text")
    assert caught.value.hint == "Set data.format to chat or auto."


def test_question_and_answer_of_a_test_row() -> None:
    ((conversation, _),) = convert({"messages": [SYSTEM, USER, ANSWER]})
    assert conversation.question_and_answer() == ([SYSTEM, USER], "a")
    with pytest.raises(DataError, match="plain text has no question"):
        convert({"text": "t"})[0][0].question_and_answer()


def test_system_message_is_added_only_where_there_is_none() -> None:
    (bare, _), (own, _) = convert({"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER]})
    assert bare.with_system("new").messages == [{"role": "system", "content": "new"}, USER, ANSWER]
    assert own.with_system("new") is own
    assert bare.with_system(None) is bare


def test_digest_goes_by_content_not_by_place_or_layout() -> None:
    (one, _), (other, _) = convert(
        {"messages": [USER, ANSWER]}, {"messages": [{"content": "q", "role": "user"}, ANSWER]}
    )
    assert one.digest() == other.digest() == convert({"prompt": "q", "completion": "a"})[0][0].digest()
    assert one.digest() != convert({"prompt": "q", "completion": "b"})[0][0].digest()
