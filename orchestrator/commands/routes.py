"""`adaptory routes …`: which adapters answer under which public name."""

from __future__ import annotations

import copy
import functools
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.backend import Backend, complete_route, complete_tenant, complete_version
from orchestrator.commands.output import Json, console, fields, moment, number, print_json, say, short_moment, table

if TYPE_CHECKING:
    from orchestrator.routing.repository import Route

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="ROUTE", help="TENANT/NAME.", autocompletion=complete_route)]


def complete_fallback(incomplete: str) -> list[str]:
    words = [word for word in ("none", "base", "previous") if word.startswith(incomplete)]
    return words + complete_version(incomplete)


class Part(StrEnum):
    """What `set --clear` takes away."""

    adapter = "adapter"
    base = "base"
    fallback = "fallback"
    system = "system"
    temperature = "temperature"
    top_p = "top-p"
    top_k = "top-k"
    max_tokens = "max-tokens"
    seed = "seed"
    stop = "stop"
    schema = "schema"


# Where each lives in a route's config.
_PLACES: dict[Part, tuple[str, ...]] = {
    Part.adapter: ("adapters",),
    Part.base: ("base_model",),
    Part.fallback: ("fallback",),
    Part.system: ("defaults", "system"),
    Part.schema: ("defaults", "json_schema"),
    **{
        part: ("defaults", "sampling", part.name)
        for part in (Part.temperature, Part.top_p, Part.top_k, Part.max_tokens, Part.seed, Part.stop)
    },
}


@app.command("list", epilog="Example: adaptory routes list --tenant acme")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", autocompletion=complete_tenant)] = None,
    as_json: Json = False,
) -> None:
    """List routes: what answers, and what stands in when it cannot."""
    from orchestrator.routing.repository import list_routes

    found = list_routes(Backend().db, tenant=tenant)
    if as_json:
        print_json([_facts(route) for route in found])
        return
    if not found:
        say("There are no routes. Make one: adaptory routes set acme/intents --adapter acme/intents@production")
        return
    result = table("route", "adapters", "fallback", "revision", "by", "since", right=("revision",), whole=("since",))
    for route in found:
        adapters, fallback = _adapters(route.config), _fallback(route.config)
        result.add_row(
            str(route.public_name),
            adapters,
            fallback,
            str(route.revision),
            route.created_by,
            short_moment(route.created_at),
        )
    console().print(result)


@app.command("show", epilog="Example: adaptory routes show acme/intents")
def show(name: Name, as_json: Json = False) -> None:
    """Show a route and who changed it when."""
    from orchestrator.names import QualifiedName
    from orchestrator.routing.repository import list_revisions

    revisions = list_revisions(Backend().db, QualifiedName.parse(name))
    if as_json:
        print_json({**_facts(revisions[0]), "history": [_facts(each) for each in revisions]})
        return
    out = console()
    out.print(_view(revisions[0], title=f"Route {name}"))
    out.print()
    columns = ("revision", "set", "by", "adapters", "fallback", "")
    history = table(*columns, title="History", right=("revision",), whole=("set",))
    for each in revisions:
        said = f"revision {each.restores} again" if each.restores else ""
        adapters, fallback = _adapters(each.config), _fallback(each.config)
        history.add_row(str(each.revision), moment(each.created_at), each.created_by, adapters, fallback, said)
    out.print(history)


@app.command(
    "set", epilog="Example: adaptory routes set acme/intents --adapter acme/intents@production --fallback base"
)
def set_(
    name: Name,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REF[=WEIGHT]",
            help="acme/intents@production, @3 or @sha256:…; repeat to share the users.",
            autocompletion=complete_version,
        ),
    ] = None,
    fallback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="none|base|previous|REF",
            help="Who answers when the adapter cannot; repeat for an order.",
            autocompletion=complete_fallback,
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="Base model; default the one its adapters were trained on.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT|@FILE", help="System message of conversations without one.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Used where a request names none; so the next four.")
    ] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")] = None,
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Schema that answers follow.", dir_okay=False)
    ] = None,
    clear: Annotated[list[Part] | None, typer.Option(help="Take this setting away; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Make a route, or change what is named of it; the rest stays. Serving follows within two seconds."""
    from orchestrator.errors import RouteInvalid
    from orchestrator.names import QualifiedName
    from orchestrator.registry.resolving import resolve_references
    from orchestrator.routing.config import parse_config
    from orchestrator.routing.repository import find_route, save_route

    route = QualifiedName.parse(name)
    given = {
        Part.adapter: [_arm(each) for each in adapter] if adapter else None,
        Part.base: base,
        Part.fallback: [each for each in fallback if each != "none"] if fallback else None,
        Part.system: _text(system) if system else None,
        Part.temperature: temperature,
        Part.top_p: top_p,
        Part.top_k: top_k,
        Part.max_tokens: max_tokens,
        Part.seed: seed,
        Part.stop: stop or None,
        Part.schema: _read(schema) if schema else None,
    }
    changes = {part: value for part, value in given.items() if value is not None}
    if not changes and not clear:
        raise RouteInvalid("Nothing to set.", hint="`adaptory routes set --help` lists what can be.", route=name)
    backend = Backend()
    now = find_route(backend.db, route)
    values = copy.deepcopy(now.config) if now else {}
    for part in clear or ():
        _put(values, _PLACES[part], None)
    for part, value in changes.items():
        _put(values, _PLACES[part], value)
    config = parse_config(route, values)
    saved = save_route(
        backend.db,
        route,
        config,
        actor=backend.actor,
        expected=now.revision if now else 0,
        resolver=functools.partial(resolve_references, backend.db),
    )
    _said(saved, "says already" if now and saved.revision == now.revision else "says now", as_json)


@app.command("rollback", epilog="Example: adaptory routes rollback acme/intents")
def rollback(
    name: Name,
    to: Annotated[int | None, typer.Option(min=1, help="Revision; default the one before the present.")] = None,
    as_json: Json = False,
) -> None:
    """Bring back what an earlier revision said, or a route that was deleted. Twice goes back twice."""
    from orchestrator.names import QualifiedName
    from orchestrator.routing.repository import rollback as back

    backend = Backend()
    saved = back(backend.db, QualifiedName.parse(name), actor=backend.actor, to=to)
    _said(saved, f"is back at revision {saved.restores or saved.revision} and says", as_json)


@app.command("delete", epilog="Example: adaptory routes delete acme/intents")
def delete(
    name: Name,
    expect: Annotated[int | None, typer.Option(min=1, help="Only if this revision is in force.")] = None,
    as_json: Json = False,
) -> None:
    """Take a route away. Its adapters stay, and so does its history: rollback brings it back."""
    from orchestrator.names import QualifiedName
    from orchestrator.routing.repository import delete_route

    backend = Backend()
    gone = delete_route(backend.db, QualifiedName.parse(name), actor=backend.actor, expected=expect)
    if as_json:
        print_json({"deleted": True, **_facts(gone)})
        return
    console().print(f"Route {name} is deleted; within two seconds it answers nobody any more.", soft_wrap=True)
    say(f"This brings it back: adaptory routes rollback {name}")


# --- reading what was typed -----------------------------------------------------------------------------------------


def _arm(text: str) -> dict[str, Any]:
    reference, _, weight = text.partition("=")
    if weight and not re.fullmatch("[0-9]{1,9}", weight):
        raise typer.BadParameter(f"{text!r}: a weight is a whole number, as in {reference}=90.")
    return {"adapter": reference, **({"weight": int(weight)} if weight else {})}


def _text(text: str) -> str:
    return _read(Path(text[1:])).rstrip("\n") if text.startswith("@") else text


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}.") from error


def _put(values: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set a nested value; None takes it away, so that its default holds."""
    *parents, last = place
    for parent in parents:
        values = values.setdefault(parent, {})
    if value is None:
        values.pop(last, None)
    else:
        values[last] = value


# --- showing --------------------------------------------------------------------------------------------------------


def _facts(route: Route) -> dict[str, Any]:
    """For machines; the schema as the object that it is."""
    facts = route.model_dump(mode="json")
    if text := facts["config"].get("defaults", {}).get("json_schema"):
        facts["config"]["defaults"]["json_schema"] = json.loads(text)
    return {"route": str(route.public_name), **facts}


def _said(route: Route, what: str, as_json: bool) -> None:
    print_json(_facts(route)) if as_json else console().print(_view(route, title=f"Route {route.public_name} {what}:"))


def _view(route: Route, *, title: str) -> Any:
    defaults = route.config.get("defaults", {})
    sampling = {name: value for name, value in defaults.get("sampling", {}).items() if value not in (None, [])}
    pairs = [
        ("adapters", _adapters(route.config)),
        ("base model", route.config.get("base_model") or "of its adapters"),
        ("fallback", _fallback(route.config)),
        ("system", defaults.get("system")),
        ("sampling", ", ".join(f"{name} {_value(value)}" for name, value in sampling.items())),
        ("schema", defaults.get("json_schema")),
        ("revision", f"{route.revision}, by {route.created_by}, {moment(route.created_at)}"),
    ]
    return fields(pairs, title=title)


def _value(value: Any) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, list) else number(value)


def _adapters(config: dict[str, Any]) -> str:
    arms = config.get("adapters", [])
    total = sum(arm["weight"] for arm in arms)
    if len(arms) < 2:
        return arms[0]["adapter"] if arms else "none: the base model answers"
    return "\n".join(f"{arm['adapter']}  {number(100 * arm['weight'] / total)}%" for arm in arms)


def _fallback(config: dict[str, Any]) -> str:
    return ", then ".join(config.get("fallback", [])) or "none"
