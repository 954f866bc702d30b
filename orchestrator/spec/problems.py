"""What is wrong with a spec's field, in words: the field, its value, what is allowed, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.spec.job import JobSpec

FieldPath = tuple[str | int, ...]

_LATER = {
    ("evaluate", "gate"): "Gates are not in this version yet.",
}
_LATER_METHODS = ("dpo", "orpo", "kto", "grpo")


@dataclass(frozen=True)
class Problem:
    path: FieldPath
    value: Any
    message: str
    hint: str

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


def later(data: dict[str, Any]) -> tuple[FieldPath, str, str] | None:
    """The first field that is designed but not built yet, as (path, message, hint)."""
    for path, words in _LATER.items():
        section: Any = data
        for name in path:
            section = section.get(name) if isinstance(section, dict) else None
        if section is not None:
            name = ".".join(path)
            return path, f"`{name}` cannot be used: {words}", f"Remove {name}."
    method = data.get("method")
    if isinstance(method, dict) and str(method.get("type")).lower() in _LATER_METHODS:
        return ("method", "type"), f"method.type {method['type']} is not in this version yet.", "Use sft."
    workers = data.get("resources", {}).get("workers") if isinstance(data.get("resources"), dict) else None
    if isinstance(workers, dict):
        message = "a range of workers (min, max) is not in this version yet."
        return ("resources", "workers"), message, "Give one number, for instance resources.workers: 2."
    return None


def problem(details: Any, data: dict[str, Any]) -> Problem:
    """Describe one entry of `ValidationError.errors()`."""
    path, info, owner = _resolve(details["loc"])
    kind, value = details["type"], details.get("input")
    name = ".".join(map(str, path))
    documented = (info.description or "").replace("\n", " ") if info else ""
    if kind == "extra_forbidden":
        return Problem(path, value, f"there is no field `{name}` (value {_short(value)}).", _meant(path, owner))
    if kind == "missing":
        return Problem(path, None, f"`{name}` is missing.", f"Add it: {documented}" if documented else "Add it.")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path, name = (*path, "type"), f"{name}.type"
        tags = [str(tag).strip("'\" ") for tag in details["ctx"].get("expected_tags", "").split(",")]
        tag = details["ctx"].get("tag", value)
        return Problem(path, tag, f"`{name}` is {_short(tag)}; allowed: {_or(tags)}.", _did_you_mean(str(tag), tags))
    if kind in _SWEEP_KINDS:
        return _sweep_problem(kind, path, value, details.get("ctx", {}), data)
    if kind == "value_error":
        words = str(details["ctx"]["error"])
        path = path or _mentioned(words, data)
        return Problem(path, _at(data, path), f"{words}.", "")
    if name == "" or (info is None and kind != "string_type"):
        return Problem(path, value, f"{name or 'the spec'}: {details['msg']} (value {_short(value)}).", "")
    allowed = _allowed(info) if info else "text"
    hint = _did_you_mean(value, _choices(info.annotation)) if info and isinstance(value, str) else ""
    return Problem(path, value, f"`{name}` is {_short(value)}; allowed: {allowed}.", hint or documented)


@cache
def union_fields() -> dict[str, str]:
    """Top-level sections that are tagged unions, with the type they have when nothing says so."""
    return {
        name: info.get_default(call_default_factory=False).type
        for name, info in JobSpec.model_fields.items()
        if info.discriminator or any(type(m).__name__ == "Discriminator" for m in info.metadata)
    }


# --- the spec's structure -------------------------------------------------------------------------------------------


def _resolve(loc: tuple[str | int, ...]) -> tuple[FieldPath, FieldInfo | None, type[BaseModel]]:
    """A pydantic location as the path that a person wrote, with the field there and the model that holds it.

    pydantic puts a union's tag, or the name of the member it tried, into the location; a person writes neither.
    """
    path: list[str | int] = []
    info: FieldInfo | None = None
    owner: type[BaseModel] = JobSpec
    models: list[type[BaseModel]] = [JobSpec]
    named: list[type[BaseModel]] = []
    for part in loc:
        if named:  # what stands under a name that the person chose
            path.append(part)
            models, named = named, []
        elif len(models) > 1:
            models = [model for model in models if _tag(model) == part]
        elif models:
            owner = models[0]
            path.append(part)
            info = owner.model_fields.get(str(part))
            models = _models(info.annotation) if info else []
            named = _named(info.annotation) if info else []
        elif isinstance(part, int):
            path.append(part)
    return tuple(path), info, owner


def holds_section(info: FieldInfo) -> bool:
    """Whether a field is a section that has defaults, so that `train:` with nothing below it means them."""
    return bool(_models(info.annotation)) and not info.is_required() and info.default is not None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold: none for a plain value, several for a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for member in get_args(annotation) for model in _models(member)]
    return []


def _named(annotation: Any) -> list[type[BaseModel]]:
    """The models that a mapping holds by name."""
    return _models(get_args(annotation)[1]) if get_origin(annotation) is dict else []


def _tag(model: type[BaseModel]) -> str:
    """By which a union knows its member: its `type`, or, of a range, its only field."""
    fields = model.model_fields
    return fields["type"].default if "type" in fields else next(iter(fields))


def _fields(model: type[BaseModel] = JobSpec, prefix: str = "") -> Iterator[str]:
    """Every field's full name, sections before what they hold."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for member in _models(info.annotation):
            yield from _fields(member, f"{prefix}{name}.")


# --- what is allowed ------------------------------------------------------------------------------------------------


def _allowed(info: FieldInfo) -> str:
    if models := _models(info.annotation):
        return "a section with " + ", ".join(dict.fromkeys(name for model in models for name in model.model_fields))
    return _kind(info.annotation, info.metadata)


def _kind(annotation: Any, metadata: list[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner: list[Any] = [m for item in args[1:] for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _kind(args[0], inner)
    if origin in (Union, UnionType):
        return _or([_kind(member, []) for member in args])
    if origin is Literal:
        return _or([str(choice) for choice in args])
    some = any(isinstance(m, MinLen) for m in metadata)
    if origin is list:
        return "a list of at least one" if some else f"a list of {_kind(args[0], [])}"
    if origin is dict:
        return "a mapping of at least one field to what is tried" if some else "a mapping"
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(_kind(arg, []) for arg in args)
    if annotation is type(None):
        return "null"
    pattern = next((m.pattern for m in metadata if getattr(m, "pattern", None)), None)
    if pattern:
        return f"text that matches {pattern}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(annotation, "a value")
    if annotation is str and some:
        return "text that is not empty"
    limits = [
        f"{sign} {_figure(getattr(m, name))}"
        for kind, name, sign in (
            (Gt, "gt", "above"),
            (Ge, "ge", "at least"),
            (Lt, "lt", "below"),
            (Le, "le", "at most"),
        )
        for m in metadata
        if isinstance(m, kind)
    ]
    return f"{words} {' and '.join(limits)}" if limits else words


def _figure(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for member in get_args(annotation) for choice in _choices(member)]


# --- sweeps ---------------------------------------------------------------------------------------------------------

_SWEEP_KINDS = ("sweep", "search_field", "search_kind", "search_range", "search_value")
"""Errors that `sweep_check` and the ranges raise."""


def _sweep_problem(kind: str, path: FieldPath, value: Any, context: dict[str, Any], data: dict[str, Any]) -> Problem:
    name, last = ".".join(map(str, path)), str(path[-1])
    match kind:
        case "sweep":
            return Problem(path, value, f"{context['words']}.", context["hint"])
        case "search_range":
            return Problem(path, value, f"`{name}` {context['words']}.", context["hint"])
        case "search_field":
            meant = context["near"] or _ELSEWHERE.get(last)
            hint = f"Did you mean {meant}?" if meant else context["known"]
            return Problem(path, _at(data, path), f"there is no field `{last}` to search.", hint)
        case "search_kind":
            ranges = "{loguniform: [1.0e-5, 1.0e-3]}, {uniform: [0, 0.1]}, {randint: [1, 4]}, {choice: [1, 2]} or {grid: [1, 2]}"
            meant = f"For instance {{choice: {value}}}." if isinstance(value, list) and value else ""
            if last in JobSpec.model_fields and isinstance(value, dict) and value:
                meant = f"Write {next(iter(value))} directly below search."
            return Problem(path, value, f"`{name}` is {_short(value)}; allowed: one of {ranges}.", meant)
    info = _resolve(context["refused"])[1]
    allowed = _allowed(info) if info else "another value"
    hint = _did_you_mean(value, _choices(info.annotation)) if info and isinstance(value, str) else ""
    return Problem(path, value, f"`{name}` is {_short(value)}; {context['field']} takes {allowed}.", hint)


# --- what was meant -------------------------------------------------------------------------------------------------

_ELSEWHERE = {
    "lr": "train.learning_rate",
    "r": "tuning.rank",
    "lora_r": "tuning.rank",
    "lora_alpha": "tuning.alpha",
    "lora_dropout": "tuning.dropout",
    "target_modules": "tuning.targets",
    "use_rslora": "tuning.rslora",
    "model": "base_model",
    "dataset": "data.train",
    "training_file": "data.train",
    "validation_file": "data.validation",
    "n_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_seq_length": "train.max_length",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "num_workers": "resources.workers",
}
"""Other tools' names for our fields: spelling alone would not find them."""


def _meant(path: FieldPath, owner: type[BaseModel]) -> str:
    """The field that an unknown one was probably meant to be, else those that its section has."""
    name, prefix = str(path[-1]), "".join(f"{part}." for part in path[:-1])
    level, everywhere = list(owner.model_fields), list(dict.fromkeys(_fields()))
    last = {full.rpartition(".")[2]: full for full in reversed(everywhere)}
    guess = None
    if close := difflib.get_close_matches(name, level, 1, 0.75):
        guess = prefix + close[0]
    elif found := last.get(name) or _ELSEWHERE.get(name):
        guess = found
    elif close := difflib.get_close_matches(name, level, 1, 0.6):
        guess = prefix + close[0]
    elif close := difflib.get_close_matches(name, list(last), 1, 0.7):
        guess = last[close[0]]
    section = f"`{prefix[:-1]}`" if prefix else "A spec"
    if guess == prefix + name:  # a field of another member of the union
        return f"{prefix}type {owner.model_fields['type'].default} has no such field; change the type or remove it."
    return f"Did you mean {guess}?" if guess else f"{section} has {', '.join(level)}."


def _did_you_mean(value: Any, choices: list[str]) -> str:
    close = difflib.get_close_matches(str(value), choices, 1)
    return f"Did you mean {close[0]}?" if close else ""


def _mentioned(words: str, data: dict[str, Any]) -> FieldPath:
    """The first field that a sentence names and that the data has, so that the sentence gets a line."""
    names = set(_fields())
    for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", words):
        if word in names and word.split(".")[0] in data:
            return tuple(word.split("."))
    return ()


def _at(data: Any, path: FieldPath) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _short(value: Any) -> str:
    """As YAML writes it, where Python writes it otherwise."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
