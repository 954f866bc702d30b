"""`adaptory keys …`: API keys. A key is printed once, when it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands import values
from orchestrator.commands.backend import Backend, complete_tenant
from orchestrator.commands.output import Json, console, moment, print_json, say, short_moment, table

if TYPE_CHECKING:
    from orchestrator.tenants.keys import ApiKey, IssuedKey

app = typer.Typer(no_args_is_help=True)

Reference = Annotated[str, typer.Argument(metavar="KEY", help="Id of the key (ak-…) or its name.")]
Of = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.", autocompletion=complete_tenant)]
Lifetime = Annotated[
    str | None, typer.Option("--expires-in", metavar="DURATION", help="How long it is valid: 12h, 90d, …")
]


@app.command("list", epilog="Example: adaptory keys list --tenant acme")
def list_(tenant: Of = None, as_json: Json = False) -> None:
    """List keys by what everybody may see of them."""
    from orchestrator.tenants.keys import list_keys

    found = list_keys(Backend().db, tenant=tenant)
    if as_json:
        print_json([_facts(key) for key in found])
        return
    if not found:
        say("There are no keys. Make one: adaptory keys create --name laptop")
        return
    result = table(
        "key", "name", "tenant", "scopes", "state", "created", "expires", whole=("key", "created", "expires")
    )
    for key in found:
        expires = moment(key.expires_at)[:16] or "never"
        scopes = ", ".join(key.scopes)
        result.add_row(
            f"{key.prefix}…", key.name, key.tenant, scopes, key.state().value, short_moment(key.created_at), expires
        )
    console().print(result)


@app.command("create", epilog="Example: adaptory keys create --tenant acme --name ci --expires-in 90d")
def create(
    name: Annotated[str, typer.Option(help="What it is for; unique among the tenant's keys in use.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose it is; default ADAPTORY_TENANT.", autocompletion=complete_tenant)
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="inference: ask models; admin: change the tenant's things. Repeatable.")
    ] = None,
    expires_in: Lifetime = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from orchestrator.tenants.keys import Scope, create_key
    from orchestrator.tenants.tenant import ensure_tenant

    known = {each.value: each for each in Scope}
    for word in scope or ():
        if word not in known:
            raise typer.BadParameter(f"{word!r} is no scope; scopes are {' and '.join(known)}.")
    lifetime = values.seconds(expires_in) if expires_in else None
    backend = Backend()
    if tenant is None:  # this machine's own tenant needs no ceremony
        tenant = ensure_tenant(backend.db, backend.settings.tenant, actor=backend.actor).name
    scopes = [known[word] for word in scope or (Scope.INFERENCE.value,)]
    _reveal(create_key(backend.db, tenant, name, scopes=scopes, lifetime=lifetime, actor=backend.actor), as_json)


@app.command("rotate", epilog="Example: adaptory keys rotate ci --tenant acme --grace 24h")
def rotate(
    key: Reference,
    tenant: Of = None,
    grace: Annotated[str, typer.Option(metavar="DURATION", help="How long the old key still works.")] = "24h",
    expires_in: Lifetime = None,
    as_json: Json = False,
) -> None:
    """Replace a key by a new one of the same name and scopes, and print the new one, once."""
    from orchestrator.tenants.keys import rotate_key

    lifetime, seconds = values.seconds(expires_in) if expires_in else None, values.seconds(grace)
    backend = Backend()
    issued = rotate_key(backend.db, key, tenant=tenant, grace=seconds, lifetime=lifetime, actor=backend.actor)
    _reveal(issued, as_json, also=f"The old key works for another {grace} at most.")


@app.command("revoke", epilog="Example: adaptory keys revoke ak-x7k2m4q5d3fa")
def revoke(key: Reference, tenant: Of = None, as_json: Json = False) -> None:
    """End a key: the next request with it is refused."""
    from orchestrator.tenants.keys import revoke_key

    backend = Backend()
    ended = revoke_key(backend.db, key, tenant=tenant, actor=backend.actor)
    if as_json:
        print_json(_facts(ended))
    else:
        console().print(f"The key {ended.prefix}… ({ended.name} of {ended.tenant}) is revoked.")


def _facts(key: ApiKey) -> dict[str, Any]:
    return {**key.model_dump(mode="json"), "state": key.state().value}


def _reveal(issued: IssuedKey, as_json: bool, also: str = "") -> None:
    key = issued.key
    if as_json:
        print_json({**_facts(key), "key": issued.secret})
        return
    typer.echo(issued.secret)  # the result, and nothing else: a shell may put it into a variable
    until = f"until {moment(key.expires_at)}" if key.expires_at else "without an end"
    say(f"Key {key.name} of tenant {key.tenant}, for {' and '.join(key.scopes)}, {until}. {also}".rstrip())
    say("Keep it now: it is not shown again.")
