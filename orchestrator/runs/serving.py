"""What a run's spec says of serving: when it has succeeded, its adapter gets an alias and goes behind a route."""

from __future__ import annotations

import copy
from functools import partial

from orchestrator.db import Database
from orchestrator.errors import AdapterError, InvalidName, RouteInvalid, TenantNotFound
from orchestrator.names import QualifiedName
from orchestrator.registry.resolving import resolve_references
from orchestrator.registry.versions import Reference, find_version, history, move_alias
from orchestrator.routing.config import parse_config
from orchestrator.routing.repository import find_route, save_route
from orchestrator.runs import repository
from orchestrator.runs.result import RunResult
from orchestrator.runs.run import Run
from orchestrator.spec.job import ServeSpec

_STEP = "serving"


def serve(db: Database, run: Run, result: RunResult) -> None:
    """Do what the spec says, once: an event tells how it went. It may be killed at any line and run again.

    Raises:
        DatabaseError, RouteConflict: not now; the next pass does it.
    """
    asked = run.spec.get("serve")
    if not asked or repository.noted(db, run, _STEP):
        return
    spec = ServeSpec.model_validate(asked)
    if worse := _worse(run, result):
        return repository.note(db, run, _STEP, f"{worse}: it is not put behind {run.tenant}/{spec.route}.", "warn")
    try:
        message = _put(db, run, spec)
    except (AdapterError, InvalidName, RouteInvalid, TenantNotFound) as error:
        return repository.note(
            db, run, _STEP, f"It cannot be put behind {run.tenant}/{spec.route}: {error.message}", "error"
        )
    repository.note(db, run, _STEP, message, "info")


def _put(db: Database, run: Run, spec: ServeSpec) -> str:
    actor = f"run {run.id}"
    alias = Reference(tenant=run.tenant, name=run.name, selector=spec.alias)
    if not any(entry.actor == actor for entry in history(db, alias)):  # else somebody may have moved it since
        version = find_version(db, Reference(tenant=run.tenant, name=run.name, selector=run.adapter))
        move_alias(db, version, spec.alias, actor=actor)
    name = QualifiedName(run.tenant, spec.route)
    now = find_route(db, name)
    said = copy.deepcopy(now.config) if now else {}
    said["adapters"] = [{"adapter": str(alias)}]
    said["fallback"] = [] if spec.fallback == "none" else [spec.fallback]
    saved = save_route(
        db,
        name,
        parse_config(name, said),
        actor=actor,
        expected=now.revision if now else 0,
        resolver=partial(resolve_references, db),
    )
    return f"{alias} answers behind {name} (revision {saved.revision})."


def _worse(run: Run, result: RunResult) -> str | None:
    """What it does not reach in the first metric that the spec names: the base model, or that with examples. More of each is better."""
    found = result.evaluation
    if found is None:
        return None
    first = run.spec["evaluate"]["metrics"][0]
    before, after = found.before[first], found.after[first]
    if after < before:
        return f"{first} fell from {before:.3f} to {after:.3f}"
    if found.few_shot is not None and after < found.few_shot[first]:
        shown = f"{found.examples:g} example{'' if found.examples == 1 else 's'}"
        return f"{first} is {after:.3f}, and the base model with {shown} before each question has {found.few_shot[first]:.3f}"
    return None
