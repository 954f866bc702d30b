"""From a YAML file and `--set` overrides to a `JobSpec`; every error names file, line, field, value and what is allowed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.errors import SpecError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.problems import FieldPath, Problem, holds_section, later, problem, union_fields

_MOST_NODES = 50_000
"""Of a spec: aliases that multiply each other would otherwise fill the memory."""
_MOST_LEVELS = 50
_MOST_BITS = 256
"""Of a whole number; beyond some 4,300 digits Python refuses even to print one."""


class _Loader(yaml.SafeLoader):
    """YAML's safe subset with 1.2's numbers: `1e-3` is a float, and a date stays the text that it is."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass
class _Document:
    """A YAML document as plain values, with the place that each field came from."""

    source: str
    """The file, as the person named it."""
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[FieldPath, int] = field(default_factory=dict)
    """Line of each field, from 1."""
    overrides: dict[FieldPath, str] = field(default_factory=dict)
    """Fields that came from `--set`, with its text."""

    def at(self, line: int) -> tuple[str, dict[str, Any]]:
        """A line of the document in words and facts."""
        return f"{self.source}, line {line}", {"file": self.source, "line": line}

    def place(self, path: FieldPath) -> tuple[str, dict[str, Any]]:
        """Where `path`, or the nearest section around it, was written: words for a message, and facts for machines."""
        for length in range(len(path), -1, -1):
            if text := self.overrides.get(path[:length]):
                return f"--set {text}", {"override": text}
            if line := self.lines.get(path[:length]):
                return self.at(line)
        return self.source, {"file": self.source}


def load_spec(path: str | Path, overrides: list[str] | None = None) -> JobSpec:
    """The job spec in a YAML (or JSON) file, with `overrides` such as `train.epochs=2` laid over it.

    Raises:
        SpecError: the file, a field or an override cannot be used.
    """
    return parse_spec(_read(Path(path)), str(path), overrides)


def parse_spec(text: str, source: str, overrides: list[str] | None = None) -> JobSpec:
    """As `load_spec`, of text that came from `source`."""
    document = _Document(source)
    _parse(text, document)
    _override(document, overrides or [])
    _default_types(document.data)
    if found := later(document.data):
        field_path, message, hint = found
        where, facts = document.place(field_path)
        raise SpecError(f"{where}: {message}", hint=hint, field=".".join(map(str, field_path)), **facts)
    try:
        return JobSpec.model_validate(document.data)
    except ValidationError as error:
        raise _spec_error(error, document) from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job spec, with the documentation of every field, so that editors complete it."""
    schema = JobSpec.model_json_schema()
    schema.pop("description", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Adaptory job spec"}


# --- reading --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise SpecError(
            f"There is no file {path}.",
            hint="Examples are in jobs/examples; name one of them or your own.",
            file=str(path),
        ) from error
    except OSError as error:
        raise SpecError(
            f"{path} cannot be read: {error.strerror}.", hint="Name a YAML file.", file=str(path)
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8.",
            hint="Save the file as UTF-8.",
            file=str(path),
            line=line,
        ) from error


def _parse(text: str, document: _Document) -> None:
    source = document.source
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise SpecError(
                f"{source} is empty.",
                hint="A spec needs at least name, base_model and data.train; jobs/examples has some.",
                file=source,
                line=1,
            )
        if not isinstance(root, yaml.MappingNode):
            raise SpecError(
                f"{source}, line {root.start_mark.line + 1}: a spec is a mapping of fields (`name: …`), "
                f"this is {'a list' if isinstance(root, yaml.SequenceNode) else repr(root.value[:60])}.",
                hint="Start with `name: my-run`; jobs/examples has whole specs.",
                file=source,
                line=root.start_mark.line + 1,
            )
        document.data = _Construct(loader, document).value(root, ())
    except yaml.YAMLError as error:
        raise _yaml_error(error, text, source) from error
    except RecursionError as error:  # of PyYAML itself, at several hundred levels
        where, facts = document.at(loader.line + 1 if loader else 1)
        raise _too_deep(where, facts) from error
    finally:
        if loader is not None:
            loader.dispose()


class _Construct:
    """Builds plain values from YAML nodes and records the line of each field."""

    def __init__(self, loader: _Loader, document: _Document):
        self.loader, self.document, self.open, self.count = loader, document, set[int](), 0

    def value(self, node: yaml.Node, path: FieldPath) -> Any:
        self.count += 1
        if len(path) > _MOST_LEVELS:
            raise _too_deep(*self.document.at(node.start_mark.line + 1))
        if id(node) in self.open or self.count > _MOST_NODES:
            raise self._refuse(node, path, "an alias repeats itself without end.", "Write the values out.")
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.open.discard(id(node))

    def _scalar(self, node: yaml.Node, path: FieldPath) -> Any:
        name, text = ".".join(map(str, path)), f"{node.value!r:.60}"
        try:
            value = self.loader.construct_object(node)
        except ValueError as error:  # more digits than Python reads, or what an explicit tag (`!!int x`) does not allow
            raise self._refuse(
                node, path, f"`{name}` is {text}, which cannot be read.", "Write another value."
            ) from error
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise self._refuse(node, path, f"`{name}` is {text}, which no field can hold.", "Write a smaller number.")
        return value

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                field_name = ".".join(map(str, (*path, name)))
                raise self._refuse(
                    key,
                    (*path, name),
                    f"{field_name} is set again; line {seen[name]} sets it first.",
                    "Keep one of them.",
                )
            seen[name] = line
        self.loader.flatten_mapping(node)
        # A key that is written here comes after what `<<` merged, and wins.
        result = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._refuse(key, path, "a field's name must be plain text.", "Write `field: value`.")
            name = str(key.value)
            self.document.lines[(*path, name)] = key.start_mark.line + 1
            result[name] = self.value(child, (*path, name))
        return result

    def _refuse(self, node: yaml.Node, path: FieldPath, what: str, hint: str) -> SpecError:
        where, facts = self.document.at(node.start_mark.line + 1)
        return SpecError(f"{where}: {what}", hint=hint, field=".".join(map(str, path)), **facts)


def _too_deep(where: str, facts: dict[str, Any]) -> SpecError:
    return SpecError(
        f"{where}: values are nested more than {_MOST_LEVELS} levels deep.",
        hint="A spec needs four; look for brackets that are not closed.",
        **facts,
    )


def _yaml_error(error: yaml.YAMLError, text: str, source: str) -> SpecError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    position = getattr(error, "position", None)
    if mark is not None:
        line = mark.line + 1
    elif position is not None:  # a character that YAML does not allow, such as NUL
        line = text.count("\n", 0, position) + 1
    else:
        line = 1
    lines = text.splitlines()
    shown = lines[line - 1] if line <= len(lines) else ""
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if "\t" in shown[: len(shown) - len(shown.lstrip())] or "'\\t'" in what:
        return SpecError(
            f"{source}, line {line}: a tab stands where YAML wants spaces.",
            hint="Indent with spaces.",
            file=source,
            line=line,
        )
    return SpecError(
        f"{source}, line {line}: this is not YAML: {what}.",
        hint=f"Look at `{shown.strip()[:80]}` and the line before it."
        if shown.strip()
        else "Something above is not closed.",
        file=source,
        line=line,
        value=shown.strip()[:200],
    )


# --- overrides ------------------------------------------------------------------------------------------------------


def _override(document: _Document, overrides: list[str]) -> None:
    """Lay `a.b=value` over the data. A change of `type` goes first and clears the other fields of its section."""
    parsed = [_split(text) for text in overrides]
    for path, value, text in sorted(parsed, key=lambda item: item[0][-1] != "type"):
        section = document.data
        for depth, name in enumerate(path[:-1], 1):
            below = section.get(name)
            if below is None:
                below = section[name] = {}
                document.overrides[tuple(path[:depth])] = text
            if not isinstance(below, dict):
                parent = ".".join(path[:depth])
                raise SpecError(
                    f"--set {text}: {parent} is {below!r} and has no field {path[depth]}.",
                    hint=f"Set {parent} itself, or correct the name.",
                    override=text,
                    field=".".join(path),
                    value=below,
                )
            section = below
        if path[-1] == "type" and section.get("type") not in (None, value):
            section.clear()
        section[path[-1]] = value
        document.overrides[tuple(path)] = text


def _split(text: str) -> tuple[list[str], Any, str]:
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise SpecError(
            f"--set {text}: an override is `field=value`.", hint="For instance --set train.epochs=2.", override=text
        )
    return path, _value(text, value, tuple(path)), text


def _value(text: str, value: str, path: FieldPath) -> Any:
    """What stands behind the `=` of an override, read as the same text in the file would be."""
    document = _Override(text)
    loader = None
    try:
        loader = _Loader(value)
        node = loader.get_single_node()
        return None if node is None else _Construct(loader, document).value(node, path)
    except RecursionError as error:
        raise _too_deep(*document.at(1)) from error
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or str(error)
        raise SpecError(
            f"--set {text:.200}: the value is not YAML: {what}.",
            hint="""Quote it as YAML does, for instance --set 'data.system="a: b"'.""",
            override=text,
            field=".".join(map(str, path)),
            value=value,
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


class _Override(_Document):
    """The value of one `--set`, which has no file and no line."""

    def at(self, line: int) -> tuple[str, dict[str, Any]]:
        return f"--set {self.source:.200}", {"override": self.source}


def _default_types(data: dict[str, Any]) -> None:
    """A tagged section that does not say its `type` has the default one (`tuning: {rank: 4}` is LoRA), an empty one all."""
    for name, info in JobSpec.model_fields.items():
        if data.get(name, "") is None and holds_section(info):
            del data[name]
    for name, default in union_fields().items():
        section = data.get(name)
        if isinstance(section, dict) and "type" not in section:
            data[name] = {"type": default, **section}


# --- errors ---------------------------------------------------------------------------------------------------------


def _spec_error(error: ValidationError, document: _Document) -> SpecError:
    """One SpecError of everything that pydantic found, in the order of the file."""
    found: dict[FieldPath, Problem] = {}
    for details in error.errors(include_url=False):
        described = problem(details, document.data)
        found.setdefault(described.path, described)
    # A union reports each member that it tried: the most exact place says it all.
    exact = [one for path, one in found.items() if not any(other[: len(path)] == path != other for other in found)]
    placed = [(document.place(described.path), described) for described in exact]
    placed.sort(key=lambda item: item[0][1].get("line", 0))
    (where, facts), first = placed[0]
    message = f"{where}: {first.message}"
    if len(placed) == 1:
        hint = first.hint
    else:
        others = "\n".join(f"  {place}: {other.message} {other.hint}".rstrip() for (place, _), other in placed[1:])
        hint = f"{first.hint}\nAlso:\n{others}"
    return SpecError(message, hint=hint or None, field=first.name, value=_jsonable(first.value), **facts)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value if isinstance(value, str | int | float | bool | list | dict | type(None)) else str(value)
