"""`adaptory usage`: who used how much of what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands import values
from orchestrator.commands.backend import Backend, complete_tenant
from orchestrator.commands.output import Json, console, moment, number, print_json, say, table

if TYPE_CHECKING:
    from orchestrator.tenants.usage import By

_GROUPS: tuple[By, ...] = ("tenant", "route", "adapter", "hour")
_SUMS = ("requests", "tokens_in", "tokens_out")


def register(root: typer.Typer) -> None:
    root.command("usage", epilog="Example: adaptory usage --tenant acme --since 7d --by route --by hour")(usage)


def usage(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.", autocompletion=complete_tenant)] = None,
    since: Annotated[str, typer.Option(metavar="TIME", help="A duration before now (24h, 30d) or a date.")] = "30d",
    until: Annotated[str | None, typer.Option(metavar="TIME", help="The same; default now.")] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Add up by tenant, route, adapter, hour; repeatable. Default all but hour.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show requests and tokens per tenant, route and adapter. Counted in whole hours."""
    from orchestrator.tenants.tenant import get_tenant
    from orchestrator.tenants.usage import report

    for word in by or ():
        if word not in _GROUPS:
            raise typer.BadParameter(f"{word!r} is nothing to add up by; take {', '.join(_GROUPS)}.")
    groups = tuple(group for group in _GROUPS if group in by) if by else _GROUPS[:-1]
    start, end = values.moment_of(since), values.moment_of(until) if until else None
    db = Backend().db
    if tenant is not None:
        get_tenant(db, tenant)  # a typing mistake is not an empty answer
    rows = report(db, by=groups, tenant=tenant, since=start, until=end)
    if as_json:
        print_json(rows)
        return
    if not rows:
        say(f"Nothing was used since {moment(start)}.")
        return
    result = table(*groups, *(name.replace("_", " ") for name in _SUMS), right=("requests", "tokens in", "tokens out"))
    for row in rows:
        result.add_row(*(_cell(group, row[group]) for group in groups), *(number(row[name]) for name in _SUMS))
    console().print(result)


def _cell(group: str, value: Any) -> str:
    if group == "hour":
        return moment(value)[:16]
    if group == "adapter":
        return str(value).removeprefix("sha256:")[:12] or "base"
    return str(value)
