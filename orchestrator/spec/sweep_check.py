"""What no sweep could use: found when the spec is read, before anything is started, and said with the place it stands at."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from orchestrator.spec.search import LogUniform, Uniform
from orchestrator.spec.sweep import (
    MOST_TRIALS,
    SEARCHED_OF_TRAIN,
    SEARCHED_OF_TUNING,
    SweepSpec,
    full_name,
    short_name,
    trial_spec,
)

if TYPE_CHECKING:
    from orchestrator.spec.job import JobSpec

_REST = 0.381966
"""A share of a range at which no field has a value of its own: a field that takes the ends but not this takes whole numbers."""


def check_sweep(job: JobSpec, sweep: SweepSpec) -> None:
    """
    Raises:
        pydantic.ValidationError: what cannot be searched, reported or decided; every problem that was found.
    """
    found = [
        *_fields(job, sweep),
        *_metric(job, sweep),
        *_scheduler(job, sweep),
        *_trials(sweep),
        *_placement(job, sweep),
    ]
    if not found:
        found = list(_values(job, sweep)) or list(_trunk(job, sweep))
    if found:
        raise ValidationError.from_exception_data("SweepSpec", found)


def searchable(job: JobSpec) -> list[str]:
    """Full names of the fields that trials of this job may differ in."""
    tuning = [name for name in SEARCHED_OF_TUNING if name in type(job.tuning).model_fields]
    return [f"train.{name}" for name in SEARCHED_OF_TRAIN] + [f"tuning.{name}" for name in tuning]


# --- fields and values ----------------------------------------------------------------------------------------------


def _fields(job: JobSpec, sweep: SweepSpec) -> Iterator[InitErrorDetails]:
    known, seen = searchable(job), dict[str, str]()
    can = f"Fields that can be searched: {', '.join(map(short_name, known))}."
    for name in sweep.search:
        full, place = full_name(name), ("search", name)
        if full in seen:
            yield _wrong(place, f"`{name}` is searched twice", f"It is {seen[full]} as well; keep one of them.", name)
        elif full in known:
            seen[full] = name
        elif short_name(full) in SEARCHED_OF_TUNING and full == full_name(short_name(full)):
            words = f"`{name}` cannot be searched: tuning.type {job.tuning.type} has no such field"
            yield _wrong(place, words, can, name)
        elif _exists(job, name):
            words = f"`{name}` cannot be searched: trials share the base model, the rows and the machines"
            yield _wrong(place, words, can, name)
        else:
            names = [*map(short_name, known), *known]
            near = difflib.get_close_matches(name, names, 1, 0.6) or difflib.get_close_matches(
                short_name(name), names, 1, 0.6
            )
            context = {"near": near[0] if near else None, "known": can}
            error = PydanticCustomError("search_field", "there is no field to search of that name", context)
            yield InitErrorDetails(type=error, loc=("sweep", *place), input=name)


def _exists(job: JobSpec, name: str) -> bool:
    section, _, field = name.rpartition(".")
    models = {"": job, **{name: part for name, part in job if isinstance(part, BaseModel)}}
    held = [models[section]] if section and section in models else models.values()
    return any(field in type(model).model_fields for model in held)


def _values(job: JobSpec, sweep: SweepSpec) -> Iterator[InitErrorDetails]:
    """Each range by the trials that its ends would be: what a field takes is the field's own to say."""
    for name, one in sweep.search.items():
        [kind] = type(one).model_fields  # twice in a place: pydantic counts a union's tag as a part of it
        for index, value in enumerate(one.ends):
            if (refused := _refusal(job, name, value)) is not None:
                yield _not_taken(("search", name, kind, kind, index), full_name(name), refused, value)
                break
        else:
            if isinstance(one, LogUniform | Uniform):
                inside = one.low + _REST * (one.high - one.low)
                if _refusal(job, name, inside) is not None:
                    words = f"`sweep.search.{name}.{kind}` is a range of fractions, and {full_name(name)} takes whole numbers"
                    yield _wrong(("search", name, kind, kind), words, "Use randint, or choice with a list.", one.ends)


def _refusal(job: JobSpec, name: str, value: Any) -> tuple[str | int, ...] | None:
    """Where a trial's spec refuses a value; None where it takes it."""
    try:
        trial_spec(job.model_copy(update={"sweep": None}), {name: value})
    except ValidationError as error:
        return error.errors(include_url=False)[0]["loc"]
    return None


def _not_taken(
    place: tuple[str | int, ...], field: str, refused: tuple[str | int, ...], value: Any
) -> InitErrorDetails:
    error = PydanticCustomError(
        "search_value", "{field} does not take this value", {"field": field, "refused": refused}
    )
    return InitErrorDetails(type=error, loc=("sweep", *place), input=value)


# --- the rest -------------------------------------------------------------------------------------------------------


def _metric(job: JobSpec, sweep: SweepSpec) -> Iterator[InitErrorDetails]:
    place = ("metric",)
    if _unvalidated(job):
        words = f"`sweep.metric` {sweep.metric} is reported by nobody, since data.validation is 0"
        yield _wrong(place, words, "Set data.validation to a fraction such as 0.1, or to a file.", sweep.metric)
    if sweep.mode not in (None, sweep.better):
        words = f"`sweep.mode` {sweep.mode} would choose the worst trial by {sweep.metric}"
        yield _wrong(("mode",), words, f"Write {sweep.better}, or leave it out.", sweep.mode)
    if sweep.metric == "validation_loss":
        return
    if job.evaluate is None:
        words = f"`sweep.metric` {sweep.metric} is reported by nobody, since there is no `evaluate`"
        yield _wrong(place, words, f"Add evaluate: {{metrics: [{sweep.metric}]}}, and data.test.", sweep.metric)
    elif sweep.metric not in job.evaluate.metrics:
        words = f"`sweep.metric` {sweep.metric} is not among evaluate.metrics ({', '.join(job.evaluate.metrics)})"
        yield _wrong(place, words, "Add it there, or choose one of those.", sweep.metric)


def _scheduler(job: JobSpec, sweep: SweepSpec) -> Iterator[InitErrorDetails]:
    if sweep.scheduler != "asha" and sweep.reduction_factor is not None:
        words = f"`sweep.reduction_factor` means nothing to the scheduler {sweep.scheduler}"
        yield _wrong(("reduction_factor",), words, "Remove it, or use asha.", sweep.reduction_factor)
    if sweep.scheduler == "none":
        if sweep.grace is not None:
            words = "`sweep.grace` means nothing where no scheduler stops a trial"
            yield _wrong(("grace",), words, "Remove it, or use asha.", sweep.grace)
        return
    first = min(1.0, *_epochs(job, sweep))
    if sweep.grace_epochs < first:
        words = f"`sweep.grace` is {sweep.grace_epochs:g} epochs, and trials report first after {first:g}"
        yield _wrong(
            ("grace",), words, f"Write at least {first:g}: nothing is known of a trial before.", sweep.grace_epochs
        )


def _trials(sweep: SweepSpec) -> Iterator[InitErrorDetails]:
    combinations = sweep.combinations
    if combinations is None:
        name, one = next((name, one) for name, one in sweep.search.items() if one.count is None)
        [kind] = type(one).model_fields
        hint = f"Give {name} as choice: [...] or grid: [...]"
        if sweep.searcher == "grid":
            words = f"`sweep.searcher` grid cannot go through {name}: {kind} has values without end"
            yield _wrong(("searcher",), words, f"{hint}, or use the searcher random.", sweep.searcher)
        if sweep.trials == "all":
            words = f"`sweep.trials` all has no end: {name} is {kind}"
            yield _wrong(("trials",), words, f"{hint}, or give a number of trials.", sweep.trials)
    elif sweep.count > combinations:
        words = f"`sweep.trials` is {sweep.count}, and the space has {combinations} combinations"
        yield _wrong(("trials",), words, "Write all, or search more.", sweep.trials)
    elif sweep.count > MOST_TRIALS:
        words = f"`sweep.trials` all would be {sweep.count:,} trials; at most {MOST_TRIALS:,} are allowed"
        yield _wrong(("trials",), words, "Search less, or give a number of trials.", sweep.trials)


def _placement(job: JobSpec, sweep: SweepSpec) -> Iterator[InitErrorDetails]:
    if sweep.placement == "packed" and job.tuning.type != "lora":
        words = f"`sweep.placement` packed needs tuning.type lora, and this is {job.tuning.type}"
        yield _wrong(("placement",), words, "Use auto: such trials run side by side, as many as fit.", sweep.placement)
    elif sweep.placement == "packed" and not job.train.packing:
        words = "`sweep.placement` packed needs train.packing, and it is false"
        yield _wrong(("placement",), words, "Leave train.packing out: it changes no result.", sweep.placement)


def _trunk(job: JobSpec, sweep: SweepSpec) -> Iterator[InitErrorDetails]:
    """Trials of different lengths warm up alike where they share a trunk, as long as the longest would."""
    space = sweep.space
    if "train.epochs" not in space or "warmup_stable_decay" not in _possible(job, sweep, "schedule"):
        return
    if job.train.warmup_steps is not None or "train.warmup_steps" in space:
        return
    epochs, warmup = _epochs(job, sweep), max(_possible(job, sweep, "warmup"))
    if warmup * max(epochs) >= min(epochs):
        name = next(name for name in sweep.search if full_name(name) == "train.epochs")
        words = (
            f"a warmup of {warmup:g} of {max(epochs):g} epochs is as long as the shortest trial ({min(epochs):g} epochs); "
            f"trials that differ in epochs alone share it"
        )
        yield _wrong(("search", name), words, "Lower train.warmup, or set train.warmup_steps.", name)


def _epochs(job: JobSpec, sweep: SweepSpec) -> list[float]:
    return [float(value) for value in _possible(job, sweep, "epochs") if isinstance(value, int | float)] or [1.0]


def _possible(job: JobSpec, sweep: SweepSpec, field: str) -> list[Any]:
    """The ends of what a field of `train` can be."""
    one = sweep.space.get(f"train.{field}")
    return one.ends if one is not None else [getattr(job.train, field)]


def _unvalidated(job: JobSpec) -> bool:
    return job.data.validation == 0


def _wrong(place: tuple[str | int, ...], words: str, hint: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError("sweep", "{words}", {"words": words, "hint": hint})
    return InitErrorDetails(type=error, loc=("sweep", *place), input=value)
