"""`adaptory tenants …`: who may use the endpoint, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands import values
from orchestrator.commands.backend import Backend, complete_tenant
from orchestrator.commands.output import Json, console, fields, moment, number, print_json, say, short_moment, table

if TYPE_CHECKING:
    from orchestrator.limits.quota import Quota
    from orchestrator.tenants.tenant import Tenant

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="TENANT", help="Name of the tenant.", autocompletion=complete_tenant)]
Requests = Annotated[
    str | None, typer.Option("--requests-per-minute", metavar="N|none", help="Requests a minute; none: no limit.")
]
Tokens = Annotated[
    str | None, typer.Option("--tokens-per-minute", metavar="N|none", help="Tokens a minute, in and out together.")
]
Concurrent = Annotated[
    str | None, typer.Option("--concurrent-requests", metavar="N|none", help="Requests being answered at once.")
]


@app.command("list", epilog="Example: adaptory tenants list --json")
def list_(as_json: Json = False) -> None:
    """List tenants and their quotas."""
    from orchestrator.tenants.tenant import list_tenants

    found = list_tenants(Backend().db)
    if as_json:
        print_json([tenant.model_dump(mode="json") for tenant in found])
        return
    if not found:
        say("There are no tenants. The first run adds one, and so does: adaptory tenants add acme")
        return
    limits = ("requests/min", "tokens/min", "at once")
    result = table("tenant", *limits, "created", "", right=limits, whole=("tenant", "created"))
    for tenant in found:
        quota, state = (_limit(value) for _, value in tenant.quota), "disabled" if tenant.disabled_at else ""
        result.add_row(tenant.name, *quota, short_moment(tenant.created_at), state)
    console().print(result)


@app.command("show", epilog="Example: adaptory tenants show acme")
def show(name: Name, as_json: Json = False) -> None:
    """Show a tenant: its quotas and its keys."""
    from orchestrator.tenants.keys import list_keys
    from orchestrator.tenants.tenant import get_tenant

    db = Backend().db
    tenant, keys = get_tenant(db, name), list_keys(db, tenant=name)
    if as_json:
        shown = [{**key.model_dump(mode="json"), "state": key.state().value} for key in keys]
        print_json({**tenant.model_dump(mode="json"), "keys": shown})
        return
    pairs: list[tuple[str, Any]] = [("created", moment(tenant.created_at)), *_quota(tenant.quota)]
    pairs.append(("disabled since", moment(tenant.disabled_at)))
    pairs.append(("keys", "\n".join(f"{key.prefix}…  {key.name}, {key.state().value}" for key in keys) or "none"))
    console().print(fields(pairs, title=f"Tenant {tenant.name}"))


@app.command("add", epilog="Example: adaptory tenants add acme --requests-per-minute 600 --tokens-per-minute 200000")
def add(
    name: Annotated[str, typer.Argument(metavar="TENANT", help="Lower-case letters, digits and dashes.")],
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent_requests: Concurrent = None,
    as_json: Json = False,
) -> None:
    """Add a tenant. Without a quota it may use all there is."""
    from orchestrator.limits.quota import Quota
    from orchestrator.tenants.tenant import add_tenant

    backend = Backend()
    quota = Quota(**_changes(requests_per_minute, tokens_per_minute, concurrent_requests))
    _said(add_tenant(backend.db, name, quota, actor=backend.actor), "is added", as_json)


@app.command("set", epilog="Example: adaptory tenants set acme --concurrent-requests 16 --tokens-per-minute none")
def set_(
    name: Name,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent_requests: Concurrent = None,
    as_json: Json = False,
) -> None:
    """Change a tenant's quotas; what is not named stays. The next request is held to them."""
    from orchestrator.errors import TenantError
    from orchestrator.tenants.tenant import set_quota

    changes = _changes(requests_per_minute, tokens_per_minute, concurrent_requests)
    if not changes:
        raise TenantError(
            "Nothing to set.", hint="Name at least one of the limits; `adaptory tenants set --help` lists them."
        )
    backend = Backend()
    _said(set_quota(backend.db, name, changes, actor=backend.actor), "is changed", as_json)


@app.command("disable", epilog="Example: adaptory tenants disable acme")
def disable(name: Name, as_json: Json = False) -> None:
    """Refuse a tenant's keys from the next request on; everything it owns is kept, and enable undoes it."""
    from orchestrator.tenants.tenant import disable_tenant

    backend = Backend()
    _said(disable_tenant(backend.db, name, actor=backend.actor), "is disabled: its keys are refused", as_json)


@app.command("enable", epilog="Example: adaptory tenants enable acme")
def enable(name: Name, as_json: Json = False) -> None:
    """Let a disabled tenant's keys work again."""
    from orchestrator.tenants.tenant import enable_tenant

    backend = Backend()
    _said(enable_tenant(backend.db, name, actor=backend.actor), "is enabled", as_json)


@app.command("delete", epilog="Example: adaptory tenants delete acme")
def delete(
    name: Name,
    forget_usage: Annotated[
        bool, typer.Option("--forget-usage", help="Also one that has used something: its usage is lost.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete a tenant without routes, keys in use, adapters and runs. One that has some can be disabled."""
    from orchestrator.tenants.deletion import delete_tenant

    backend = Backend()
    gone = delete_tenant(backend.db, name, actor=backend.actor, forget_usage=forget_usage)
    if as_json:
        print_json({"deleted": True, **gone.model_dump(mode="json")})
    else:
        console().print(f"Tenant {gone.name} is deleted.")


def _changes(requests: str | None, tokens: str | None, concurrent: str | None) -> dict[str, int | None]:
    given = {"requests_per_minute": requests, "tokens_per_minute": tokens, "concurrent_requests": concurrent}
    return {name: values.limit(text) for name, text in given.items() if text is not None}


def _said(tenant: Tenant, what: str, as_json: bool) -> None:
    if as_json:
        print_json(tenant.model_dump(mode="json"))
    else:
        console().print(fields(_quota(tenant.quota), title=f"Tenant {tenant.name} {what}."))


def _quota(quota: Quota) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _limit(value)) for name, value in quota]


def _limit(value: int | None) -> str:
    return "no limit" if value is None else number(value)
