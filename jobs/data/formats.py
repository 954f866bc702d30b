"""Row formats: recognised by their keys and turned into one shape, a `Conversation`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from jobs.data.files import Row, Where
from jobs.data.json_text import MOST_LEVELS, BadJson, decode_whole
from orchestrator.errors import DataError

Message = dict[str, Any]
"""`role` (system, user, assistant, tool), `content` (text), and for the assistant `weight` (0 or 1) and `tool_calls`."""


@dataclass(frozen=True)
class Conversation:
    """A row in one shape: messages that end with the assistant's answer, or plain text."""

    where: Where
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    """Set instead of `messages` for rows of plain text."""

    @property
    def content(self) -> dict[str, Any]:
        """What the row says, without its place."""
        return {"text": self.text} if self.text is not None else {"messages": self.messages, "tools": self.tools}

    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON of the row: what the split and the search for duplicates go by."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True, separators=(",", ":")).encode()).digest()

    def number(self) -> int:
        """The first eight bytes of the digest: what is kept of each row in memory (uint64)."""
        return int.from_bytes(self.digest()[:8], "big")

    def with_system(self, system: str | None) -> Conversation:
        """The same with `system` first, unless it has a system message or is plain text."""
        if system is None or self.text is not None or self.messages[0]["role"] == "system":
            return self
        return replace(self, messages=[{"role": "system", "content": system}, *self.messages])

    def question_and_answer(self) -> tuple[list[Message], str]:
        """What is asked (to be rendered with a generation prompt) and the last answer.

        Raises:
            DataError: plain text has neither.
        """
        if self.text is not None:
            raise _error("plain text has no question and answer to test on", self.where, "Use rows with an answer.")
        last = self.messages[-1]
        return self.messages[:-1], last["content"] or json.dumps([c["function"] for c in last["tool_calls"]])


def _error(what: str, where: Where, hint: str, **context: Any) -> DataError:
    return DataError(f"{where}: {what}.", hint=hint, file=where.file, line=where.line, **context)


def _no_answer(field: str, where: Where) -> DataError:
    return _error(f"the row has no answer ({field})", where, "Add the answer, or delete the row.", field=field)


# --- recognising ----------------------------------------------------------------------------------------------------


def conversations(rows: Iterable[Row], format: str = "auto") -> Iterator[tuple[Conversation, str]]:
    """Each row as a conversation, with the name of its format. The first row decides; the others must have the same.

    Raises:
        DataError: an unknown or a mixed format, a row without an answer, or a field that cannot be used.
    """
    named = format != "auto"
    for row, where in rows:
        nulls = {key for key, value in row.items() if value is None}  # Parquet fills absent keys with null
        row = {key: value for key, value in row.items() if value is not None}
        found = recognise(row, where, None if format == "auto" else format, nulls)
        if format == "auto":
            format = found
        if found != format:
            if named:
                what, hint = f"this row is {found}, data.format names {format}", f"Set data.format to {found} or auto."
            else:
                what = f"mixed formats: this row is {found}, the rows before it are {format}"
                hint = f"Put {found} and {format} rows in separate files and convert one of them."
            raise _error(what, where, hint, value=found)
        conversation = _FORMATS[format].convert(row, where)
        _require_text(conversation)
        yield conversation, format


def _require_text(conversation: Conversation) -> None:
    """Refuse what JSON or UTF-8 cannot write, and so neither template nor tokenizer: the first such value is named."""
    try:
        json.dumps(conversation.content, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        for field, value in _leaves(conversation.content):
            if isinstance(value, str):
                if any("\ud800" <= character <= "\udfff" for character in value):
                    raise _error(
                        f"{field} holds half of a surrogate pair (an escape like \\ud83d alone), which is no character",
                        conversation.where,
                        "Write the row's text again as UTF-8.",
                        field=field,
                    ) from error
            elif not isinstance(value, int | float | None):
                raise _error(
                    f"{field} is {value!r:.60}, a {type(value).__name__}, which no chat template can write",
                    conversation.where,
                    "Write it as text.",
                    field=field,
                ) from error
        raise _error(f"the row cannot be written as JSON ({error})", conversation.where, "Correct the row.") from error


def _leaves(value: Any, field: str = "", levels: int = MOST_LEVELS) -> Iterator[tuple[str, Any]]:
    """Every name and every value that holds no other, with where it stands."""
    if isinstance(value, dict) and levels:
        for name, child in value.items():
            yield field or "the row", name
            yield from _leaves(child, f"{field}.{name}" if field else str(name), levels - 1)
    elif isinstance(value, list) and levels:
        for number, child in enumerate(value):
            yield from _leaves(child, f"{field}[{number}]", levels - 1)
    else:
        yield field, value


def recognise(row: dict[str, Any], where: Where, expected: str | None = None, nulls: Set[str] = frozenset()) -> str:
    """Name of the row's format: `expected` if it has that one's keys, else the first whose keys are all there.

    Args:
        nulls: keys that the row has without a value.

    Raises:
        DataError: the row has no answer, is a preference pair, or has keys that no format has.
    """
    if expected and _FORMATS[expected].keys <= row.keys():
        return expected
    for pair in _PREFERENCES:
        if pair <= row.keys():
            raise _error(
                f"preference pairs ({', '.join(sorted(pair))}) are for DPO, which comes in a later version",
                where,
                "For supervised fine-tuning keep the preferred answer only, as prompt and completion.",
            )
    for name, format in _FORMATS.items():
        if format.keys <= row.keys():
            return name
    candidates = [expected] if expected else list(_FORMATS)
    for name in candidates:
        if _FORMATS[name].question in row:
            raise _no_answer(_FORMATS[name].answer, where)
    for name in candidates:
        if _FORMATS[name].question in nulls and _FORMATS[name].keys <= row.keys() | nulls:
            field = _FORMATS[name].question
            raise _error(f"{field} is null", where, "Fill it in, or delete the row.", field=field)
    wanted = "; ".join(f"{name}: {', '.join(sorted(_FORMATS[name].keys))}" for name in candidates)
    raise _error(
        f"the row's keys ({', '.join(map(str, row)) or 'none'}) are those of no known format",
        where,
        f"Keys are, by format: {wanted}.",
    )


# --- converting -----------------------------------------------------------------------------------------------------


def _chat(row: dict[str, Any], where: Where) -> Conversation:
    messages = [_message(m, where, f"messages[{i}]") for i, m in enumerate(_list(row, "messages", where))]
    return _answered(messages, where, "messages", _tools(row, where))


def _prompt_completion(row: dict[str, Any], where: Where) -> Conversation:
    asked = _asked(row, "prompt", where)
    if isinstance(row["completion"], list):
        messages = _list(row, "completion", where)
        answer = [_message(m, where, f"completion[{i}]") for i, m in enumerate(messages)]
    else:
        answer = [_answer(row, "completion", where)]
    return _answered([*asked, *answer], where, "completion", _tools(row, where))


def _alpaca(row: dict[str, Any], where: Where) -> Conversation:
    question = _text(row, "instruction", where)
    if row.get("input"):
        question += "\n\n" + _text(row, "input", where)
    messages = [{"role": "user", "content": question}, _answer(row, "output", where)]
    return _answered(_system(row, where) + messages, where, "output")


def _sharegpt(row: dict[str, Any], where: Where) -> Conversation:
    messages = []
    for number, turn in enumerate(_list(row, "conversations", where)):
        field = f"conversations[{number}]"
        if isinstance(turn, dict) and "from" in turn:
            turn = _sharegpt_turn(turn, where, field)
        messages.append(_message(turn, where, field))
    return _answered(_system(row, where) + messages, where, "conversations", _tools(row, where))


def _sharegpt_turn(turn: dict[str, Any], where: Where, field: str) -> Message:
    speaker, value = turn["from"], turn.get("value")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [{"function": _json(value, where, f"{field}.value")}]}
    role = _SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    message = {"role": role, "content": value}
    return message | ({"weight": turn["weight"]} if "weight" in turn else {})


def _input_ideal(row: dict[str, Any], where: Where) -> Conversation:
    ideal = row["ideal"]
    if isinstance(ideal, list):  # any of them is right; the first is learned
        row = row | {"ideal": ideal[0] if ideal else ""}
    return _answered([*_asked(row, "input", where), _answer(row, "ideal", where)], where, "ideal")


def _plain_text(row: dict[str, Any], where: Where) -> Conversation:
    text = _text(row, "text", where)
    if not text.strip():
        raise _error("the text is empty", where, "Delete the row.", field="text")
    return Conversation(where, [], text=text)


@dataclass(frozen=True)
class _Format:
    keys: frozenset[str]
    """All of them make a row one of this format."""
    question: str
    """This one without the rest makes it a row without an answer."""
    answer: str
    convert: Callable[[dict[str, Any], Where], Conversation]


# the order matters: a row that fits several is the first of them
_FORMATS = {
    "chat": _Format(frozenset({"messages"}), "messages", "messages", _chat),
    "sharegpt": _Format(frozenset({"conversations"}), "conversations", "conversations", _sharegpt),
    "input_ideal": _Format(frozenset({"input", "ideal"}), "input", "ideal", _input_ideal),
    "alpaca": _Format(frozenset({"instruction", "output"}), "instruction", "output", _alpaca),
    "prompt_completion": _Format(frozenset({"prompt", "completion"}), "prompt", "completion", _prompt_completion),
    "text": _Format(frozenset({"text"}), "text", "text", _plain_text),
}
_PREFERENCES = [frozenset({"chosen", "rejected"}), frozenset({"preferred_output", "non_preferred_output"})]

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}

# --- fields ---------------------------------------------------------------------------------------------------------

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def _message(message: Any, where: Where, field: str) -> Message:
    if not isinstance(message, dict):
        raise _error(f"{field} is {message!r:.60}, not a message", where, "Write role and content.", field=field)
    named = message.get("role")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise _error(
            f"{field}.role is {named!r:.60}",
            where,
            f"Roles are {', '.join(_ROLES)}.",
            field=f"{field}.role",
            value=named,
        )
    out: Message = {"role": role, "content": _content(message.get("content"), where, f"{field}.content")}
    if role == "assistant":
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise _error(
                f"{field}.weight is {weight!r:.60}", where, "It is 0 or 1.", field=f"{field}.weight", value=weight
            )
        if weight == 0:
            out["weight"] = 0
        if calls := message.get("tool_calls"):
            if not isinstance(calls, list):
                place = f"{field}.tool_calls"
                raise _error(f"{place} is {calls!r:.60}, not a list", where, "Write [{function}, …].", field=place)
            out["tool_calls"] = [_tool_call(c, where, f"{field}.tool_calls[{i}]") for i, c in enumerate(calls)]
        for reasoning in ("reasoning_content", "thinking"):
            if isinstance(message.get(reasoning), str):
                out["reasoning_content"] = message[reasoning]
    if role == "tool" and message.get("tool_call_id"):
        out["tool_call_id"] = message["tool_call_id"]
    if role == "tool" and message.get("name"):
        out["name"] = message["name"]
    return out


def _content(content: Any, where: Where, field: str) -> str:
    """Text, or the joined text parts of a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise _error(f"{field} has a part of type {kind}", where, "Only text is trained on.", field=field)
        return "".join(part["text"] for part in content)
    raise _error(f"{field} is {content!r:.60}, not text", where, "Put the text in quotes.", field=field)


def _tool_call(call: Any, where: Where, field: str) -> dict[str, Any]:
    """OpenAI's shape, with the arguments as an object: chat templates write them as JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _error(f"{field} names no function", where, 'Write {"function": {"name", "arguments"}}.', field=field)
    place = f"{field}.function.arguments"
    arguments = _json(function.get("arguments") or {}, where, place)
    if not isinstance(arguments, dict):
        raise _error(f"{place} is {arguments!r:.60}, not an object", where, 'Write {"name": value, …}.', field=place)
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return out | ({"id": call["id"]} if call.get("id") else {})


def _tools(row: dict[str, Any], where: Where) -> list[dict[str, Any]] | None:
    tools = _json(row.get("tools") or [], where, "tools")
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    ):
        raise _error("tools is no list of objects", where, "Write them as in OpenAI's API.", field="tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _json(value: Any, where: Where, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return decode_whole(value)
    except BadJson as error:
        raise _error(f"in {field}, {error.what}", where, error.hint, field=field) from error
    except ValueError as error:
        raise _error(f"{field} is broken JSON ({error})", where, "Correct the row.", field=field) from error


def _list(row: dict[str, Any], field: str, where: Where) -> list[Any]:
    """A list, or its JSON text: the only way that a CSV can hold one."""
    value = _json(row[field], where, field)
    if not isinstance(value, list) or not value:
        raise _error(f"{field} is no list of messages", where, "Write [{role, content}, …].", field=field)
    return value


def _text(row: dict[str, Any], field: str, where: Where) -> str:
    if not isinstance(row[field], str):
        raise _error(f"{field} is {row[field]!r:.60}, not text", where, "Put the text in quotes.", field=field)
    return row[field]


def _answer(row: dict[str, Any], field: str, where: Where) -> Message:
    return {"role": "assistant", "content": _text(row, field, where)}


def _asked(row: dict[str, Any], field: str, where: Where) -> list[Message]:
    """The question: text from the user, or messages, in which the assistant's turns are context and not learned."""
    if isinstance(row[field], str):
        return [*_system(row, where), {"role": "user", "content": row[field]}]
    asked = [_message(m, where, f"{field}[{i}]") for i, m in enumerate(_list(row, field, where))]
    return [m | {"weight": 0} if m["role"] == "assistant" else m for m in asked]


def _system(row: dict[str, Any], where: Where) -> list[Message]:
    return [{"role": "system", "content": _text(row, "system", where)}] if row.get("system") else []


def _answered(
    messages: list[Message], where: Where, field: str, tools: list[dict[str, Any]] | None = None
) -> Conversation:
    """The conversation, once it is sure that there is something to learn from it."""
    last = messages[-1]
    if last["role"] != "assistant" or not (last["content"].strip() or last.get("tool_calls")):
        raise _no_answer(field, where)
    if not any(m["role"] == "assistant" and m.get("weight") != 0 for m in messages):
        raise _error("every assistant message has weight 0", where, "Give one weight 1, or delete the row.")
    if messages[0]["role"] == "assistant":
        raise _error("the conversation begins with the assistant", where, "Put what it answers before it.", field=field)
    return Conversation(where, messages, tools)
