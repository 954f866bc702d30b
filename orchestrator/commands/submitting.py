"""From a spec file to a submitted run, or, for `--dry-run`, to a plan that starts nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.commands.output import console, fields, listing, number, say, table
from orchestrator.errors import ClusterError

if TYPE_CHECKING:
    from rich.console import Console

    from jobs.data import DataReport
    from orchestrator.commands.backend import Backend
    from orchestrator.runs.run import Run
    from orchestrator.settings import Settings
    from orchestrator.spec.job import DataSpec, JobSpec
    from orchestrator.spec.resolved import ResolvedData
    from orchestrator.store import Store


def load(path: Path, overrides: list[str], name: str | None, settings: Settings) -> JobSpec:
    """The spec with what the command line and the environment say: `--name`, and ADAPTORY_TENANT where it names no tenant."""
    from orchestrator.spec.loading import load_spec

    said = [*overrides, *([f"name={json.dumps(name)}"] if name is not None else [])]
    spec = load_spec(path, said)
    if "tenant" not in spec.model_fields_set and settings.tenant != spec.tenant:
        spec = load_spec(path, [*said, f"tenant={json.dumps(settings.tenant)}"])
    return spec


def submit(spec: JobSpec, backend: Backend) -> Run:
    """Check what can be checked here, then hand the run to the cluster; a local Ray is started if none runs."""
    from cluster.probe import preflight
    from orchestrator.runs import submission

    submission.refuse_early(spec, store=backend.store, db=backend.db)
    checked = _check(spec, backend.settings)
    say_data(checked.data)
    for note in checked.notes:
        say(note)
    preflight(backend.jobs, backend.settings, spec)  # type: ignore[arg-type]
    return submission.submit(
        spec,
        settings=backend.settings,
        store=backend.store,
        db=backend.db,
        jobs=backend.jobs,
        resolve_data=_resolve_data,
        resolve_base_model=partial(_upload_base, backend=backend) if backend.settings.remote else None,
    )


@dataclass(frozen=True)
class _Checked:
    data: DataReport
    notes: list[str]
    """Sentences for the person: what is doubtful, and what could not be looked at."""


def _check(spec: JobSpec, settings: Settings) -> _Checked:
    """The user's mistakes that need no cluster, so that they cost seconds and not a start of Ray."""
    from jobs.data import check, try_rows
    from orchestrator.modeling.base_model import inspect
    from orchestrator.modeling.preflight import check_job

    model = inspect(spec.base_model, cache=settings.cache)
    for shape in _shapes(spec):
        check_job(shape, model)
    report = check(spec.data, Path.cwd())
    warnings, notes = report.warnings(), []
    if model.path is not None and model.tokenizer:
        length = spec.train.max_length
        warnings += try_rows(spec.data, model.path, max_length=length, base_dir=Path.cwd(), cache=settings.cache)
    elif model.path is None:
        seen = "will convert the base model" if model.source == "gguf" else "will fetch the base model"
        notes.append(
            f"Note: only the job {seen} {spec.base_model}, and see whether it is complete and fits this spec and its data."
        )
    return _Checked(report, [f"Warning: {warning}" for warning in warnings] + notes)


def _shapes(spec: JobSpec) -> Iterator[JobSpec]:
    """The job, and of a sweep each size of adapter that a trial may have: a base model may be too small for one."""
    from orchestrator.spec.sweep import trial_spec

    yield spec
    for name in ("tuning.rank", "tuning.targets"):
        for value in spec.sweep.space[name].ends if spec.sweep and name in spec.sweep.space else ():
            yield trial_spec(spec, {name: value})


def say_data(report: DataReport) -> None:
    """What the data was taken for."""
    counted = {"train": report.train, "validation": report.validation, "test": report.test}
    parts = [f"{number(part.rows)} {name}" for name, part in counted.items() if part and part.rows]
    if parts:
        say(f"Data: format {report.format}; rows: {', '.join(parts)}.")
    for source in report.unchecked:
        say(f"Data: only the job will read {source}.")


def _resolve_data(spec: DataSpec, *, store: Store) -> ResolvedData:
    from jobs.data import resolve

    return resolve(spec, store=store)


def _upload_base(reference: str, *, backend: Backend) -> str:
    """A base model that only this machine has goes to the store, so that a remote cluster's nodes can load it."""
    from orchestrator.modeling.base_model import inspect, materialize, publish_base

    cache = backend.settings.cache
    if inspect(reference, cache=cache).source not in ("directory", "gguf"):
        return reference
    say(f"Putting base model {reference} into the store, for the cluster to load.")
    return publish_base(backend.store, materialize(reference, cache=cache, say=say))


# --- dry run --------------------------------------------------------------------------------------------------------


def _unsaved(url: str) -> Store:
    """The store while a dry run resolves data: it names files by their bytes and keeps none."""
    from orchestrator.store import Store, sha256_file

    class Unsaved(Store):
        def put_file(self, local: Path) -> str:
            return sha256_file(local)

    return Unsaved(url)


def _compare(spec: JobSpec, settings: Settings) -> str:
    """Refuse what a cluster that is up already could never run; else a note of what was not compared, or nothing.

    Raises:
        InsufficientResources: the job can never fit.
    """
    import cluster
    from cluster.probe import known_resources
    from cluster.resources import fit

    try:
        client = cluster.connect_if_running(settings)
        known = known_resources(client, settings) if client else None
    except ClusterError as error:
        return f"Note: what the spec asks for was not compared with the cluster. {error.message}"
    if known is None:
        return "" if client is None else "Note: what the cluster has is asked when a run is submitted."
    fit(spec.resources, known)
    return ""


def plan(spec: JobSpec, backend: Backend) -> dict[str, Any]:
    """What `run` would do, written to `ADAPTORY_HOME/dry-runs/<name>/` and returned; nothing is uploaded or started."""
    from orchestrator import store as paths
    from orchestrator.runs.submission import resolve

    settings = backend.settings
    checked = _check(spec, settings)
    report, notes = checked.data, [*checked.notes, *filter(None, [_compare(spec, settings)])]
    resolved = resolve(spec, run=None, store=_unsaved(settings.store), resolve_data=_resolve_data)
    rows = report.train.rows or None  # none: the data is where only the job reads it
    planned = {
        "training_rows": rows,
        "steps_per_epoch": math.ceil(rows / spec.train.batch_size) if rows else None,
        "steps": steps(spec, rows) if rows else None,
        "sweep": _planned_sweep(spec, rows) if spec.sweep else None,
        "workers": spec.resources.workers,
        "deepspeed": spec.deepspeed.model_dump() if spec.resources.workers > 1 or spec.tuning.type == "full" else None,
        "cluster": settings.ray_address or "local Ray",
        "store": settings.store,
        "writes": {
            "spec": paths.spec_path(f"{spec.name}-…"),
            "checkpoints": paths.checkpoints_path(f"{spec.name}-…"),
            "result": paths.result_path(f"{spec.name}-…"),
            "adapter": paths.adapter_path("…"),
        },
    }
    directory = settings.home / "dry-runs" / spec.name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spec.json").write_text(resolved.model_dump_json(indent=2) + "\n")
    whole = {
        "directory": str(directory),
        "resolved": resolved.model_dump(mode="json"),
        "data": report.model_dump(mode="json"),
        "plan": planned,
        "notes": notes,
    }
    kept = {name: whole[name] for name in ("data", "plan", "notes")}
    (directory / "plan.json").write_text(json.dumps(kept, indent=2) + "\n")
    return whole


def steps(spec: JobSpec, rows: int) -> int:
    """Optimiser steps, before rows that are too long are dropped; of a sweep, those of all trials, were none stopped early."""
    from orchestrator.spec.sweep import configs, total_steps, trial_spec

    if spec.sweep is None:
        return total_steps(spec, rows)
    chosen = configs(spec)
    if chosen is None:  # a trial of optuna may be any: as if all were as the spec has it
        return spec.sweep.count * total_steps(spec, rows)
    return sum(total_steps(trial_spec(spec, config), rows) for config in chosen)


def _planned_sweep(spec: JobSpec, rows: int | None) -> dict[str, Any]:
    """Which trials there would be."""
    from orchestrator.spec.sweep import configs, suggested, total_steps, trial_name, trial_spec

    assert spec.sweep is not None
    sweep, chosen = spec.sweep, configs(spec)
    trials = []
    for number_, config in enumerate(suggested(spec)[: sweep.count] if chosen is None else chosen, 1):
        length = total_steps(trial_spec(spec, config), rows) if rows else None
        trials.append({"trial": trial_name(number_), "config": config, "steps": length})
    return {
        "trials": trials,
        "count": sweep.count,
        "combinations": sweep.combinations,
        "all": chosen is not None and sweep.count == sweep.combinations,
        "searcher": sweep.searcher,
        "scheduler": sweep.scheduler,
        "metric": sweep.metric,
        "mode": sweep.better,
    }


def show(whole: dict[str, Any]) -> None:
    """The plan for a person: the resolved spec, what the data is, and what would happen."""
    out, planned, data = console(), whole["plan"], whole["data"]
    out.print(json.dumps(whole["resolved"]["spec"], indent=2, ensure_ascii=False), soft_wrap=True)
    out.print()
    result = table("data", "format", "rows", "duplicates", title="Data", right=("rows", "duplicates"))
    for name in ("train", "validation", "test"):
        if part := data.get(name):
            result.add_row(name, part["format"], number(part["rows"]), number(part["duplicates"]))
    out.print(result)
    for source in data.get("unchecked", []):
        out.print(f"Only the job will read {source}.")
    pairs = [
        ("training rows", _about(planned["training_rows"])),
        ("steps", _about(planned["steps"])),
        ("workers", planned["workers"]),
        ("deepspeed", planned["deepspeed"] and f"ZeRO stage {planned['deepspeed']['stage']}"),
        ("cluster", planned["cluster"]),
        ("store", planned["store"]),
        *((f"  {name}", path) for name, path in planned["writes"].items()),
    ]
    out.print(fields(pairs, title="Plan"))
    if planned["sweep"]:
        _show_sweep(planned["sweep"], out)
    for note in whole["notes"]:
        say(note)
    say(f"Nothing was started. The resolved spec is in {whole['directory']}/spec.json.")


def _show_sweep(planned: dict[str, Any], out: Console) -> None:
    from orchestrator.runs.winner import setting
    from orchestrator.spec.sweep import short_name

    trials = planned["trials"]
    names = list(trials[0]["config"]) if trials else []
    columns = ["trial", *map(short_name, names), "steps"]
    rows = [
        [
            one["trial"],
            *(setting(one["config"][name]) for name in names),
            "" if one["steps"] is None else number(one["steps"]),
        ]
        for one in trials
    ]
    right = [column for column in columns if column not in ("trial", "targets", "schedule")]
    which = ", all combinations" if planned["all"] else f" of {number(planned['combinations'])} combinations"
    which = "" if planned["combinations"] is None else which
    out.print()
    if rows:
        result = listing(columns, rows, width=out.width, right=right, drop=("steps",))
        result.title = "Trials" if len(rows) == planned["count"] else "Trials that are tried first"
        out.print(result)
    if len(rows) < planned["count"]:
        out.print(
            f"The searcher {planned['searcher']} chooses the {'others' if rows else 'trials'} by what earlier ones came to."
        )
    early = f"; {planned['scheduler']} stops the worse ones early" if planned["scheduler"] != "none" else ""
    best = "lowest" if planned["mode"] == "min" else "highest"
    out.print(f"{number(planned['count'])} trials{which}{early}; the one with the {best} {planned['metric']} wins.")


def _about(count: int | None) -> str:
    return "known when the job reads the data" if count is None else f"about {number(count)}"
