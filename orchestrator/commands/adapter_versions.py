"""`adaptory adapters import | promote | versions | history | diff | sign`: names for adapters, and what happened to them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.adapters import Reference, opened, resolved, version_json
from orchestrator.commands.backend import Backend
from orchestrator.commands.output import Json, console, fields, moment, number, print_json, say, short_moment, table
from orchestrator.errors import AdapterError

if TYPE_CHECKING:
    from orchestrator.registry.difference import Change, Difference


def register(app: typer.Typer) -> None:
    app.command(
        "import", epilog="Example: adaptory adapters import ./peft-dir --as acme/intents --base smollm2-135m-instruct"
    )(import_)
    app.command("promote", epilog="Example: adaptory adapters promote acme/intents@3 production --expect 2")(promote)
    app.command("versions", epilog="Example: adaptory adapters versions acme/intents")(versions)
    app.command("history", epilog="Example: adaptory adapters history acme/intents@production")(history)
    app.command("diff", epilog="Example: adaptory adapters diff acme/intents@2 acme/intents@production")(diff)
    app.command("sign", epilog="Example: adaptory adapters sign acme/intents@1")(sign)


def import_(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What PEFT's save_pretrained wrote.")],
    name: Annotated[str, typer.Option("--as", metavar="TENANT/NAME", help="It becomes the next version of this name.")],
    base: Annotated[
        str | None, typer.Option(help="Base model it was trained on; default: the one its configuration names.")
    ] = None,
    base_digest: Annotated[
        str | None, typer.Option(help="Digest that the base must have; alone, the base itself need not be here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check, sign and register an adapter that was trained elsewhere."""
    from orchestrator.db.audit import person
    from orchestrator.registry.importing import import_adapter
    from orchestrator.registry.versions import parse_reference

    backend = Backend()
    version = import_adapter(
        backend.db,
        backend.store,
        directory.expanduser().absolute(),
        parse_reference(name, backend.settings.tenant),
        keys=backend.keys,
        actor=person(),
        cache=backend.settings.cache,
        max_rank=backend.settings.max_rank,
        base=base,
        base_digest=base_digest,
        say=say,
    )
    if as_json:
        print_json(version_json(version))
        return
    console().print(f"Imported as {version.reference}, {version.digest}.", soft_wrap=True)
    console().print(f"  adaptory adapters promote {version.reference} production", soft_wrap=True)


def promote(
    adapter: Reference,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as production or staging.")],
    expect: Annotated[
        int | None, typer.Option(min=0, help="Only if the alias names this version now; 0: only if there is none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let an alias name a version, once that was verified; going back is the same with the older version."""
    from orchestrator.db.audit import person
    from orchestrator.registry import verification
    from orchestrator.registry.versions import find_version, move_alias, parse_reference

    if "@" not in adapter:
        raise AdapterError(f"{adapter} names no version.", hint="Write one, such as acme/intents@3.", adapter=adapter)
    backend = opened()
    version = find_version(backend.db, parse_reference(adapter, backend.settings.tenant))
    verification.verify(backend.store, version.digest, trust=backend.keys.trust()).require()
    move = move_alias(backend.db, version, alias, actor=person(), expect="any" if expect is None else expect)
    if as_json:
        print_json({**move.model_dump(mode="json"), "moved": move.moved, "digest": version.digest})
    elif not move.moved:
        console().print(f"{move.alias} names version {move.after} already.")
    else:
        was = f"was version {move.before}" if move.before else "is new"
        console().print(f"{move.alias} names version {move.after} now; it {was}.")


def versions(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Such as acme/intents; default: all names.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: Json = False,
) -> None:
    """List the numbered versions of adapters, and which of them the aliases name now."""
    from orchestrator.registry.versions import find_version, list_versions, parse_reference

    backend = opened()
    if name is None:
        found = list_versions(backend.db, tenant=tenant)
    else:
        reference = parse_reference(name, tenant or backend.settings.tenant)
        one = find_version(backend.db, reference)  # says what is near when there is none
        found = [one] if reference.selector else list_versions(backend.db, tenant=one.tenant, name=one.name)
    if as_json:
        print_json([version_json(version) for version in found])
        return
    if not found:
        say(
            "There are no versions. A run registers what it trained, and so does: adaptory adapters import DIR --as NAME"
        )
        return
    result = table("version", "aliases", "adapter", "from", "by", "created", whole=("version", "adapter", "created"))
    for version in found:
        origin = f"run {version.run_id}" if version.run_id else "import"
        by = "" if version.run_id else version.created_by
        cells = [version.reference, ", ".join(version.aliases), _short(version.digest), origin, by]
        result.add_row(*cells, short_moment(version.created_at))
    console().print(result)


def history(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as acme/intents, or acme/intents@production.")],
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 50,
    as_json: Json = False,
) -> None:
    """Show who registered versions and moved aliases, when, and from where to where; newest first."""
    from orchestrator.registry import versions as registry

    backend = opened()
    reference = registry.parse_reference(name, backend.settings.tenant)
    entries = registry.history(backend.db, reference, limit=limit)
    if not entries:
        registry.find_version(backend.db, reference)  # says what is near when there is no such name
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    result = table("when", "who", "what", "subject", "from", "to", whole=("when", "what"))
    for entry in entries:
        cells = [moment(entry.created_at), entry.actor, entry.action, entry.subject]
        result.add_row(*cells, _value(entry.before), _value(entry.after))
    console().print(result)


def diff(a: Reference, b: Reference, as_json: Json = False) -> None:
    """Compare two adapters: configuration, spec, data, metrics, and how far their weights are apart."""
    from orchestrator.registry.difference import difference
    from orchestrator.registry.verification import fetch_verified

    (backend, first), (_, second) = resolved(a), resolved(b)
    trust = backend.keys.trust()
    with tempfile.TemporaryDirectory(prefix="adaptory-diff-") as temporary:
        fetched = [
            fetch_verified(backend.store, digest, Path(temporary) / side, trust)
            for side, digest in (("a", first), ("b", second))
        ]
        found = difference(*fetched)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _show_difference(found)


def sign(adapter: Reference, as_json: Json = False) -> None:
    """Check an adapter that is not signed yet, or by a key that was replaced, and sign it with the present key."""
    from orchestrator.modeling.base_model import known_base
    from orchestrator.registry.adapters import get_adapter
    from orchestrator.registry.intake import take_in

    backend, digest = resolved(adapter)
    base = known_base(get_adapter(backend.store, digest).base_digest, backend.settings.cache)
    done = take_in(backend.db, backend.store, digest, backend.keys, base=base)
    if as_json:
        print_json({"adapter": digest, "signed": done})
        return
    console().print(f"Signed {digest}." if done else f"{digest} is signed by this key already.", soft_wrap=True)


# --- details --------------------------------------------------------------------------------------------------------

_MODULES_SHOWN = 20


def _show_difference(found: Difference) -> None:
    out = console()
    apart = None if found.relative is None else f"{found.relative:.3g} of the larger update's norm"
    pairs = [("a", found.a), ("b", found.b), ("base", "the same" if found.same_base else "another"), ("apart", apart)]
    out.print(fields(pairs))
    for title, changes in (
        ("Configuration", found.config),
        ("Spec", found.spec),
        ("Data", found.data),
        ("Metrics", found.metrics),
    ):
        if changes:
            out.print()
            out.print(_changes(title, changes))
    if found.modules:
        out.print()
        result = table("module", "a", "b", "difference", title="Norms of the updates", right=("a", "b", "difference"))
        for module in found.modules[:_MODULES_SHOWN]:
            result.add_row(module.module, *(_value(v) for v in (module.a, module.b, module.difference)))
        out.print(result)
        if (more := len(found.modules) - _MODULES_SHOWN) > 0:
            out.print(f"and {more} modules more; --json has all.")


def _changes(title: str, changes: list[Change]) -> Any:
    result = table("field", "a", "b", title=title)
    for change in changes:
        result.add_row(change.field, _value(change.a), _value(change.b))
    return result


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    if isinstance(value, str) and len(value) >= 64:
        return f"{value[:19]}…"
    return "" if value is None else number(value)


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
