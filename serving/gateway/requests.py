"""The bodies that are accepted, as OpenAI's clients send them, and what each field becomes in the engine.

What would change the answer and is not done here is refused by its name, never ignored; what changes nothing (`user`,
`metadata`, …) is accepted.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import InvalidRequest
from orchestrator.routing.config import Defaults
from orchestrator.routing.config import Sampling as RouteSampling
from serving.engine.protocol import JsonObject, JsonSchema, ResponseFormat, Sampling

LATER: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "echo": (None, False),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "store": (None, False),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "moderation": (None,),
}
"""Fields that are known but not answered yet, with the values that ask for nothing. `logprobs: 0` is no such value."""


T = TypeVar("T", bound="_Request")
Item = TypeVar("Item")

_MOST_FIELDS = 100
"""Of one object; there are not so many that are known."""
_MOST_TOKENS = 1 << 18
"""Of a prompt, before anybody looks how many the model takes."""
_MOST_ITEMS = 10_000
"""Messages of a conversation, parts of a message."""

Tokens = Annotated[list[int], Field(fail_fast=True, max_length=_MOST_TOKENS)]
Several = Annotated[list[Item], Field(fail_fast=True, max_length=_MOST_ITEMS)]


class _Body(BaseModel):
    """Whatever is wrong with a body is found without looking at all of it: four megabytes of wrong items would otherwise
    become millions of complaints, which took ten seconds and two gigabytes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise ValueError(f"there are {len(value)} fields")
        return value


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Several[TextPart] = Field(union_mode="left_to_right")
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against eavesdroppers: none is ever sent."""


class TextFormat(_Body):
    type: Literal["text"]


class JsonObjectFormat(_Body):
    type: Literal["json_object"]


class NamedSchema(_Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool | None = None
    """Answers always keep to the schema."""


class JsonSchemaFormat(_Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class _Request(_Body):
    """What both endpoints take."""

    model: str = Field(min_length=1, max_length=300)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    """Not OpenAI's: sample from so many of the likeliest tokens; 0: all."""
    ignore_eos: bool | None = None
    """Not OpenAI's, but every load generator's: go on past the end of the turn until `max_tokens`."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Several[str] | None = None
    user: str | None = Field(default=None, max_length=1000)
    safety_identifier: str | None = Field(default=None, max_length=1000)
    metadata: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @property
    def person(self) -> str | None:
        """Whom a route that splits traffic keeps with one version."""
        return self.user or self.safety_identifier

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(
        self, defaults: RouteSampling, most: int | None, usual: int, format: ResponseFormat | None
    ) -> Sampling:
        """
        Args:
            defaults: what holds where the request is silent.
            most: tokens of the answer, if the request says it.
            usual: and if nobody does.
        """
        said = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        route = defaults.model_dump(exclude_none=True, exclude_defaults=True)
        values = (
            {"temperature": 1.0, "max_tokens": usual} | route | said | ({} if most is None else {"max_tokens": most})
        )
        stop = values.pop("stop", ())
        return Sampling(
            **values,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_end=bool(self.ignore_eos),
            response_format=format,
        )


_SAMPLING = ("temperature", "top_p", "top_k", "seed", "stop")


class ChatRequest(_Request):
    messages: Several[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: Format | None = None

    def sampling(self, defaults: Defaults) -> Sampling:
        """
        Args:
            defaults: the route's.
        """
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(defaults.sampling, most, CHAT_TOKENS, self._format(defaults))

    def _format(self, defaults: Defaults) -> ResponseFormat | None:
        match self.response_format:
            case None:
                return JsonSchema(defaults.json_schema) if defaults.json_schema is not None else None
            case JsonObjectFormat():
                return JsonObject()
            case JsonSchemaFormat(json_schema=named):
                return JsonSchema(json.dumps(named.schema_))
        return None


class CompletionRequest(_Request):
    prompt: str | Several[str] | Tokens | Several[Tokens]

    def one_prompt(self) -> str | list[int]:
        """
        Raises:
            InvalidRequest: there are several.
        """
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and all(isinstance(token, int) for token in prompt)):
            return prompt  # type: ignore[return-value]  # mypy does not see through all()
        if len(prompt) != 1:
            raise InvalidRequest(
                f"prompt has {len(prompt)} prompts.",
                hint="Send one a request; they share a batch all the same.",
                field="prompt",
            )
        return prompt[0]  # type: ignore[return-value]

    def sampling(self, defaults: Defaults) -> Sampling:
        """A route's schema is for conversations."""
        return self._sampling(defaults.sampling, self.max_tokens, COMPLETION_TOKENS, None)


CHAT_TOKENS = 1024
"""Of an answer where neither the request nor the route says it: a model that never ends its turn must not run to the context's end."""
COMPLETION_TOKENS = 16
"""As OpenAI's legacy endpoint has it."""


# --- reading --------------------------------------------------------------------------------------------------------


def parse(kind: type[T], body: Any) -> T:
    """
    Raises:
        InvalidRequest: names the first field that is wrong.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    later = [name for name in LATER if name in body]
    for name in later:
        if not any(_same(body[name], harmless) for harmless in LATER[name]):
            raise InvalidRequest(
                f"{name} is not supported yet.", hint="Leave it out.", field=name, reason="unsupported_parameter"
            )
    try:
        return kind.model_validate({name: body[name] for name in body if name not in later} if later else body)
    except ValidationError as error:
        raise _explained(error) from error


def _same(one: Any, other: Any) -> bool:
    """Whether they are equal in JSON too, where 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _explained(error: ValidationError) -> InvalidRequest:
    """OpenAI's errors name one field; of the complaints of a union's members, the one that came furthest in says most."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(found, key=lambda one: (one["type"] in ("extra_forbidden", "too_long"), len(one["loc"])))
    where = _place(first["loc"])
    match first["type"]:
        case "extra_forbidden":
            message, reason = f"Unrecognized request argument supplied: {where}.", "unknown_parameter"
        case "missing":
            message, reason = f"Missing required parameter: '{where}'.", "missing_required_parameter"
        case _:
            message, reason = f"Invalid '{where}': {first['msg']}.", "invalid_value"
    return InvalidRequest(message, field=where, reason=reason)


def _place(steps: tuple[int | str, ...]) -> str:
    """A field's place in the body: without the names of the unions' members that pydantic writes between."""
    named = [str(step) for step in steps if step != "str" and "[" not in str(step)]
    if len(named) > 1 and named[0] == "response_format":
        del named[1]  # the member is called by its type
    return ".".join(named)[:200]
