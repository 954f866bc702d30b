"""What a route says: the part that a person sets, kept as an immutable revision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import InvalidName, RouteInvalid
from orchestrator.names import AdapterReference, QualifiedName, cut, shown

BASE = "base"
"""In a route's fallbacks: the base model, without an adapter."""

PREVIOUS = "previous"
"""In a route's fallbacks: the version before that which cannot answer."""

MOST_BYTES = 65_536
"""Of a system prompt or a JSON schema: every request of the route carries it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _reference(text: Any) -> str:
    try:
        return str(AdapterReference.parse(str(text)))
    except InvalidName as error:
        raise ValueError(str(error)) from error


def _fallback(text: Any) -> str:
    return text if text in (BASE, PREVIOUS) else _reference(text)


def _canonical(value: Any) -> str:
    """A JSON Schema as one line of text. As text its properties keep their order (PostgreSQL's JSONB sorts them, and answers
    follow it), nobody can change it under those who share it, and it is a key for what is compiled."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(schema, Mapping):
        raise ValueError("a JSON Schema is an object")
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES} bytes")
    return text


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("it contains a NUL character")
    return text


Reference = Annotated[str, BeforeValidator(_reference)]
Fallback = Annotated[str, BeforeValidator(_fallback)]
JsonSchema = Annotated[str, BeforeValidator(_canonical)]
"""Given as an object or as its text."""


Stop = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_storable)]


class Arm(_Part):
    adapter: Reference
    """`acme/intents@production`, `@3` or `@sha256:…`."""

    weight: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Its share of the users is weight / sum of weights."""


class Sampling(_Part):
    """Used where a request says nothing; None leaves it to the engine."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[tuple[Stop, ...], Field(max_length=4)] = ()


class Defaults(_Part):
    system: Annotated[str, Field(min_length=1, max_length=MOST_BYTES), AfterValidator(_storable)] | None = None
    """System message of conversations that bring none."""

    sampling: Sampling = Sampling()

    json_schema: JsonSchema | None = None
    """Answers follow this JSON Schema, unless a request asks for another form."""


class RouteConfig(_Part):
    adapters: Annotated[tuple[Arm, ...], Field(max_length=16)] = ()
    """Empty: the base model answers."""

    base_model: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_storable)] | None = None
    """Public name of the base; None: the one that the adapters were trained on."""

    fallback: Annotated[tuple[Fallback, ...], Field(max_length=4)] = ()
    """Who answers when the chosen adapter cannot, in this order: `base`, `previous` (of an alias, what it named before; of a
    number or a digest, the version before it), or an adapter version. Empty: nobody."""

    defaults: Defaults = Defaults()

    @model_validator(mode="after")
    def _fits_together(self) -> RouteConfig:
        if not self.adapters and self.base_model is None:
            raise ValueError("a route needs an adapter or a base model")
        names = [arm.adapter for arm in self.adapters]
        if len(set(names)) < len(names):
            raise ValueError("an adapter is named twice; give it the sum of the weights")
        if len(set(self.fallback)) < len(self.fallback):
            raise ValueError("a fallback is named twice")
        if not self.adapters and BASE in self.fallback:
            raise ValueError("the route is the base model already, so it cannot fall back to it")
        if not self.adapters and PREVIOUS in self.fallback:
            raise ValueError("the route is the base model, of which there is no previous version")
        return self

    @property
    def references(self) -> tuple[AdapterReference, ...]:
        """Every adapter that it names."""
        named = [
            *(arm.adapter for arm in self.adapters),
            *(name for name in self.fallback if name not in (BASE, PREVIOUS)),
        ]
        return tuple(AdapterReference.parse(name) for name in dict.fromkeys(named))


def parse_config(route: QualifiedName, values: Mapping[str, Any]) -> RouteConfig:
    """The route's config, checked.

    Raises:
        RouteInvalid: a field cannot be used, or it names an adapter of another tenant.
    """
    try:
        config = RouteConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        where, value = (f" at {field}" if field else ""), cut(str(first["input"])) if first["loc"] else None
        raise RouteInvalid(
            f"Route {route}{where}: {message}.",
            hint="`adaptory routes set --help` shows what it takes.",
            route=str(route),
            field=field or None,
            value=value,
        ) from error
    for reference in config.references:
        if reference.tenant != route.tenant:
            raise RouteInvalid(
                f"Route {route} cannot use {shown(str(reference))}: it is another tenant's.",
                hint=f"A route serves adapters of its own tenant only: {route.tenant}/NAME@VERSION.",
                route=str(route),
                value=str(reference),
            )
    return config
