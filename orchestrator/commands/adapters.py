"""`adaptory adapters …`: what was trained, whether it is intact, and how to take it along."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.backend import Backend, complete_version
from orchestrator.commands.following import before_after
from orchestrator.commands.output import (
    Json,
    console,
    fields,
    listing,
    moment,
    number,
    print_json,
    say,
    short_moment,
    table,
)

if TYPE_CHECKING:
    from orchestrator.registry.adapters import AdapterSummary
    from orchestrator.registry.provenance import Provenance, SweepRecord
    from orchestrator.registry.versions import AdapterVersion

app = typer.Typer(no_args_is_help=True, epilog="Example: adaptory adapters list")

Reference = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="acme/intents@production, acme/intents@3 or acme/intents@sha256:…; a run's name or id; or a digest or its "
        "first six or more digits.",
        autocompletion=complete_version,
    ),
]


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


@app.command("list", epilog="Example: adaptory adapters list --tenant acme")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None, as_json: Json = False
) -> None:
    """List the published adapters, newest first."""
    from orchestrator.registry.adapters import list_adapters

    found = list_adapters(Backend().store, tenant=tenant)
    if as_json:
        print_json([summary.model_dump(mode="json") for summary in found])
        return
    if not found:
        say("There are no adapters. Train one: adaptory run jobs/examples/finance-entities.yaml --follow")
        return
    rows = []
    for summary in found:
        owner = "" if summary.tenant == "default" else f"{summary.tenant}/"
        cells = [_short(summary.digest), owner + summary.name, summary.base_model, _tuning(summary)]
        rows.append([*cells, _bytes(summary.size), _quality(summary), short_moment(summary.created_at)])
    out, columns = console(), ("adapter", "run", "base model", "tuning", "size", "quality", "created")
    narrow, drop = ("base model", "tuning", "quality"), ("size", "tuning", "base model", "created", "quality")
    out.print(listing(columns, rows, width=out.width, right=("size",), narrow=narrow, drop=drop))


@app.command("show", epilog="Example: adaptory adapters show finance-entities")
def show(adapter: Reference, as_json: Json = False) -> None:
    """Show an adapter and where it came from."""
    from orchestrator.registry.adapters import get_adapter, read_provenance
    from orchestrator.registry.versions import list_versions

    backend, digest = resolved(adapter)
    store = backend.store
    summary, provenance = get_adapter(store, digest), read_provenance(store, digest)
    versions = list_versions(backend.db, digest=digest)
    if as_json:
        print_json(
            {
                **summary.model_dump(mode="json"),
                "url": _url(store.url, digest),
                "versions": [version_json(version) for version in versions],
                "provenance": provenance.model_dump(mode="json"),
            }
        )
        return
    _show(summary, provenance, versions, _url(store.url, digest))


@app.command("verify", epilog="Example: adaptory adapters verify 3f2a9c")
def verify(adapter: Reference, as_json: Json = False) -> None:
    """Check signature, bytes, shapes and numbers of an adapter, and that its name is the digest of its content."""
    from orchestrator.modeling.base_model import known_base
    from orchestrator.registry import verification
    from orchestrator.registry.adapters import get_adapter

    backend, digest = resolved(adapter)
    base = known_base(get_adapter(backend.store, digest).base_digest, backend.settings.cache)  # nothing is downloaded
    report = verification.verify(backend.store, digest, trust=backend.keys.trust(), base=base)
    if as_json:
        print_json({"ok": report.ok, **report.model_dump(mode="json")})
    else:
        result = table("check", "", "found", title=f"Adapter {digest}")
        for finding in report.findings:
            result.add_row(finding.check, "ok" if finding.ok else "FAILED", finding.detail)
        console().print(result)
    if not report.ok:
        if not as_json:
            report.require()
        raise typer.Exit(1)


@app.command("export", epilog="Example: adaptory adapters export finance-entities --out ./finance --merged")
def export(
    adapter: Reference,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not hold anything.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Full weights for plain transformers, instead of PEFT's files.")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Of merged weights; default as in the base model.")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter as a PEFT directory, or merged into its base model."""
    from orchestrator.registry.export import export_adapter

    backend, digest = resolved(adapter)
    path = export_adapter(
        backend.store,
        digest,
        out.expanduser().absolute(),
        cache=backend.settings.cache,
        trust=backend.keys.trust(),
        merged=merged,
        dtype=dtype.value if dtype else None,
        say=say,
    )
    if as_json:
        print_json({"adapter": digest, "path": str(path), "merged": merged})
        return
    whole = not (path / "adapter_config.json").is_file()
    load = "AutoModelForCausalLM" if whole else "peft.AutoPeftModelForCausalLM"
    console().print(f"Wrote {path}. Load it with {load}.from_pretrained({str(path)!r}).", soft_wrap=True)


def opened() -> Backend:
    """The parts, after what runs have published meanwhile was taken over and signed."""
    from orchestrator.runs.repository import open_attempts

    backend = Backend()
    if open_attempts(backend.db):
        backend.reconcile()
    return backend


def resolved(reference: str) -> tuple[Backend, str]:
    """The parts, and the digest that a reference means."""
    from orchestrator.registry.references import resolve

    backend = opened()
    return backend, resolve(backend.db, backend.store, reference, tenant=backend.settings.tenant)


def version_json(version: AdapterVersion) -> dict[str, Any]:
    return {"reference": version.reference, **version.model_dump(mode="json")}


def _won(sweep: SweepRecord) -> str:
    """`t05 of 12 trials, by validation_loss 0.3036: learning_rate 0.003, epochs 3`"""
    from orchestrator.commands.showing_sweeps import configuration

    by = sweep.metric + (f" {number(sweep.value)}" if sweep.value is not None else "")
    return f"{sweep.trial} of {sum(sweep.trials.values())} trials, by {by}: {configuration(sweep.config)}"


def _show(summary: AdapterSummary, provenance: Provenance, versions: list[AdapterVersion], url: str) -> None:
    out, measured, imported = console(), provenance.evaluation, provenance.imported
    won = provenance.sweep
    known = (v.reference + (f" ({', '.join(v.aliases)})" if v.aliases else "") for v in versions)
    pairs = [
        ("digest", summary.digest),
        ("versions", ", ".join(known)),
        ("run", f"{summary.run} (attempt {summary.attempt}, step {summary.step})" if summary.run else None),
        ("sweep", _won(won) if won else None),
        ("imported", f"by {imported.by} from {imported.source}" if imported else None),
        ("tenant", summary.tenant),
        ("base model", summary.base_model),
        ("base digest", summary.base_digest),
        ("tuning", _tuning(summary)),
        ("targets", ", ".join(summary.targets)),
        ("weights", f"{number(summary.parameters)} parameters, {summary.dtype}, {_bytes(summary.size)}"),
        ("created", moment(summary.created_at)),
        ("seed", provenance.seed),
        ("git commit", provenance.git_commit),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
        ("hardware", ", ".join(f"{name} {number(value)}" for name, value in provenance.hardware.items())),
        ("data", "\n".join(f"{name}  sha256:{sha[:12]}…" for name, sha in provenance.data.items())),
        ("stored at", url),
    ]
    out.print(fields(pairs, title=f"Adapter {summary.name}"))
    if provenance.metrics:
        out.print()
        out.print(fields([(name, number(value)) for name, value in provenance.metrics.items()], title="Metrics"))
    if measured:
        out.print()
        out.print(before_after(measured))


def _url(store: str, digest: str) -> str:
    from orchestrator.store import adapter_path

    return f"{store}/{adapter_path(digest)}"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _tuning(summary: AdapterSummary) -> str:
    if summary.kind == "full":
        return "all weights"
    return f"{'rsLoRA' if summary.rslora else 'LoRA'} rank {summary.rank}, alpha {number(summary.alpha)}"


def _quality(summary: AdapterSummary) -> str:
    shown = summary.evaluation or {k: v for k, v in summary.metrics.items() if k.endswith("loss")}
    return "\n".join(f"{name} {number(value)}" for name, value in shown.items())


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
