"""A sweep: many settings of one fine-tune. What a person writes, and the configurations and trials that come of it.

A *trial* is one configuration. `trial_spec` gives the spec of the same trial as a run of its own: what a trial computes, packed
beside others or alone, is what that run would compute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from orchestrator.spec.base import PositiveInt, SpecModel
from orchestrator.spec.search import Config, RandInt, SearchSpace, at_random, combinations, in_order

if TYPE_CHECKING:
    from orchestrator.spec.job import JobSpec

T = TypeVar("T")

MOST_TRIALS = 1_000
"""Of one sweep; all of them are kept in its result."""

SEARCHED_OF_TRAIN = (
    *("learning_rate", "epochs", "schedule", "warmup", "warmup_steps", "decay"),
    *("batch_size", "seed", "weight_decay", "max_grad_norm"),
)
SEARCHED_OF_TUNING = ("rank", "alpha", "dropout", "targets", "rslora")
"""Fields that may differ between trials which share a base model and rows. `max_length`, for one, decides which rows there are."""

_LORA_RATES = (3.0e-4, 1.0e-3)
"""Learning rates with which LoRA was best most often: 3e-4 for 14 models and 1e-3 for 10 of a published sweep (tinker-cookbook,
`recipes/chat_sl/results/sft_sweep.md`), in which 72 of the 80 runs that diverged had 3e-3."""

_AUTO_MOST, _AUTO_ENDLESS = 24, 12


class BudgetSpec(SpecModel):
    seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """No trial begins or goes on after so many seconds of training; what was reached until then counts."""

    tokens: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """The same by tokens that were really computed, over all trials."""


class SweepSpec(SpecModel):
    search: SearchSpace
    """Field → range, for instance `learning_rate: {loguniform: [1.0e-5, 3.0e-3]}` or `epochs: {choice: [1, 2, 3]}`. Fields of `train`
    and `tuning`, by their short or their full name (`train.learning_rate`)."""

    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | Literal["auto", "all"] = "auto"
    """How many configurations are tried; `all`: every combination; `auto`: all when there are at most 24, else 24, or 12 of a range
    that is continuous."""

    searcher: Literal["random", "grid", "optuna"] = "random"
    """`random` never draws a configuration twice; `grid` goes through all in order, the
    learning rate slowest; `optuna` learns from earlier trials."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the searcher. The trials' own seed is `train.seed`."""

    scheduler: Literal["asha", "median", "none"] = "asha"
    """Who stops trials early, by their validation loss at the end of each epoch: the worst at each rung (arXiv:1810.05934), those
    behind the median of the others, or nobody."""

    grace: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Epochs before which no trial is stopped; by default one, at whose end a trial reports first."""

    reduction_factor: Annotated[int, Field(ge=2, le=100)] | None = None
    """Of asha: one of so many trials goes on after each rung; by default 2, since a trial whose learning rate has not come down yet says
    little of how it will end."""

    metric: Literal["validation_loss", "exact_match", "json_valid", "entity_f1"] = "validation_loss"
    """What decides which trial is best at its end: the validation loss, or one of `evaluate.metrics` on the validation rows; `data.test`
    is kept for the winner. Schedulers go by the validation loss in any case."""

    mode: Literal["min", "max"] | None = None
    """Whether less or more is better; by default as the metric has it."""

    placement: Literal["auto", "packed", "concurrent", "one_by_one"] = "auto"
    """How trials are computed: many on one copy of the base model, as runs side by side, each with the run's own `resources`, or one after
    the other. `auto`: packed where the base model can be shared (LoRA), else concurrent."""

    max_concurrent: PositiveInt | Literal["auto"] = "auto"
    """Most trials that are computed at once; `auto`: as many packed ones as are fastest and fit, and as many others as the nodes hold."""

    budget: BudgetSpec | None = None
    """An end before all trials are done."""

    @property
    def space(self) -> SearchSpace:
        """The ranges by their fields' full names, in an order of their own: JSON does not keep the file's, and which configurations
        are drawn must not hang on it."""
        return by_field(self.search)

    @property
    def better(self) -> Literal["min", "max"]:
        return "min" if self.metric == "validation_loss" else "max"

    @property
    def combinations(self) -> int | None:
        """How many configurations there are; None when a range is continuous."""
        return combinations(self.search)

    @property
    def count(self) -> int:
        """How many trials there are, if no budget ends them."""
        if isinstance(self.trials, int):
            return self.trials
        if self.combinations is None:
            return _AUTO_ENDLESS
        return self.combinations if self.trials == "all" else min(self.combinations, _AUTO_MOST)

    @property
    def grace_epochs(self) -> float:
        return 1.0 if self.grace is None else self.grace

    @property
    def asha_reduction(self) -> int:
        return 2 if self.reduction_factor is None else self.reduction_factor


# --- names ----------------------------------------------------------------------------------------------------------


def full_name(name: str) -> str:
    """`learning_rate` → `train.learning_rate`; a name that is not known stays as it is."""
    if name in SEARCHED_OF_TRAIN:
        return f"train.{name}"
    return f"tuning.{name}" if name in SEARCHED_OF_TUNING else name


def short_name(name: str) -> str:
    """`train.learning_rate` → `learning_rate`: no two searched fields share one."""
    return name.rpartition(".")[2]


def by_field(named: Mapping[str, T]) -> dict[str, T]:
    """What is given by a field's name, by its full name, the fields in one order."""
    full = {full_name(name): value for name, value in named.items()}
    known = [full_name(name) for name in (*SEARCHED_OF_TRAIN, *SEARCHED_OF_TUNING)]
    return {name: full[name] for name in [*known, *sorted(full.keys() - set(known))] if name in full}


def trial_name(number: int) -> str:
    """Of the trial with this number, from 1: `t01`, `t02`, …"""
    return f"t{number:02d}"


# --- configurations -------------------------------------------------------------------------------------------------


def suggested(job: JobSpec) -> list[Config]:
    """What a searcher tries first: the rates with which LoRA is good most often, as far as they are in the space, and all else as the
    spec has it or in the middle of its range. Empty for full tuning, and where no learning rate is searched."""
    space = _sweep(job).space
    rates = space.get("train.learning_rate")
    if rates is None or job.tuning.type == "full":
        return []
    usual = {name: _usual(job, name, one) for name, one in space.items()}
    return [{**usual, "train.learning_rate": rate} for rate in _LORA_RATES if rates.holds(rate)]


def configs(job: JobSpec) -> list[Config] | None:
    """Every configuration of the sweep in the order in which they are tried; None where earlier trials decide about later ones."""
    sweep = _sweep(job)
    if sweep.searcher == "optuna":
        return None
    found = in_order(sweep.space) if sweep.searcher == "grid" else at_random(sweep.space, sweep.seed, suggested(job))
    return list(itertools.islice(found, sweep.count))


def _usual(job: JobSpec, name: str, one: Any) -> Any:
    section, _, field = name.partition(".")
    value: Any = getattr(getattr(job, section), field, None)
    if not one.holds(value):
        return one.middle
    return int(value) if isinstance(one, RandInt) else next((each for each in one.ends if each == value), value)


# --- trials ---------------------------------------------------------------------------------------------------------


def trial_spec(
    job: JobSpec, config: dict[str, Any], *, trial: str | None = None, warmup_steps: int | None = None
) -> JobSpec:
    """The spec of a trial as a run of its own.

    Args:
        job: the sweep's spec.
        config: field → value; full or short names.
        trial: its name, which becomes the end of the run's: `<sweep>-<trial>`.
        warmup_steps: of all trials that share a trunk, see `trunk_warmup`; taken where the schedule is `warmup_stable_decay`, the epochs
            are searched, and nobody has set `train.warmup_steps`.

    Raises:
        pydantic.ValidationError: a field cannot have the value that `config` gives it.
    """
    data = job.model_dump()
    data["sweep"] = None
    for name, value in config.items():
        section, _, field = full_name(name).partition(".")
        data[section][field] = value
    if trial is not None:
        data["name"] = f"{job.name[: 62 - len(trial)].rstrip('-')}-{trial}"
    if warmup_steps is not None and _has_trunk(job, data["train"]):
        data["train"]["warmup_steps"] = warmup_steps
    return type(job).model_validate(data)


def trunk_warmup(job: JobSpec, config: dict[str, Any], rows: int) -> int | None:
    """Optimiser steps of warmup that trials share which differ in epochs alone: those of the longest of them. None where there is no
    trunk: another schedule, one length only, or `train.warmup_steps` is set.

    Were the warmup a fraction of each trial's own length, they would part at the first step.

    Args:
        rows: of training, after those that are too long were dropped.
    """
    trial = trial_spec(job, config)
    if not _has_trunk(job, trial.train.model_dump()):
        return None
    longest = max(_sweep(job).space["train.epochs"].ends)
    return round(trial.train.warmup * total_steps(trial_spec(job, {**config, "train.epochs": longest}), rows))


def total_steps(spec: JobSpec, rows: int) -> int:
    """Optimiser steps of a run over `rows` training rows: what `jobs.train.batches` counts."""
    train = spec.train
    steps = math.ceil(max(1, round(rows * train.epochs)) / train.batch_size)
    return min(steps, train.max_steps or steps)


def _has_trunk(job: JobSpec, train: dict[str, Any]) -> bool:
    searched = "train.epochs" in _sweep(job).space
    return searched and train["schedule"] == "warmup_stable_decay" and train["warmup_steps"] is None


def _sweep(job: JobSpec) -> SweepSpec:
    if job.sweep is None:
        raise ValueError(f"{job.name} is no sweep")
    return job.sweep
