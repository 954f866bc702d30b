"""Trials, each beside the run that it is alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.sweep.packed import PackedGroup
from jobs.sweep.reports import TrialReport
from jobs.train.artifact import lora_shape
from jobs.train.engines import SingleEngine
from jobs.train.loop import SLOT, Hooks, mean_loss, train
from jobs.train.schedule import learning_rates
from jobs.train.setup import Place, make_batches, validation_batches
from jobs.train.steps import Progress
from orchestrator.modeling.decoder import adapter_parameters, adapter_tensors, add_adapter
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import load_model
from orchestrator.spec.job import JobSpec
from tests.unit.train.conftest import MadeRows, as_ranks, make_rows

__all__ = ["as_ranks", "make_rows"]

Models = Callable[[str], Path]

LENGTHS = [12, 30, 7, 25, 18, 40, 5, 9, 33, 21, 16, 28]
PER_EPOCH = 3
"""Steps, at a batch size of 4."""


def made_spec(**fields: Any) -> JobSpec:
    """Three steps an epoch in fp32, with an epsilon of Adam's so large that a rounding of a gradient that is nearly zero stays
    one. Fields by dotted path, with __ for the dot."""
    train = {"dtype": "float32", "learning_rate": 1e-2, "batch_size": 4, "epochs": 2, "warmup": 0.0, "eps": 1e-3}
    data: dict[str, Any] = {"name": "trial", "base_model": "tiny", "data": {"train": "rows"}, "train": train}
    data["tuning"] = {"type": fields.pop("tuning__type", "lora")}
    for path, value in fields.items():
        section, _, name = path.partition("__")
        data.setdefault(section, {})[name] = value
    return JobSpec.model_validate(data)


MIXED = {
    "plain": made_spec(),
    "rank": made_spec(tuning__rank=3, tuning__alpha=7.0),
    "targets": made_spec(tuning__targets=["q_proj", "down_proj"], tuning__rslora=True),
    "rate": made_spec(train__learning_rate=3e-3, train__schedule="linear", train__warmup=0.3),
    "batch": made_spec(train__batch_size=3, train__epochs=1.5),
    "seed": made_spec(train__seed=7, train__max_grad_norm=0.05),
    "dropout": made_spec(tuning__dropout=0.3, train__seed=3),
    "adam": made_spec(
        train__weight_decay=0.1, train__betas=[0.8, 0.99], train__schedule="constant", train__max_grad_norm=None
    ),
    "cut": made_spec(train__micro_batch_tokens=40),
}
"""Trials that differ in everything that may."""


def trunk(epochs: float, **fields: Any) -> JobSpec:
    """Decays over the second half: 3, 6 and 9 steps have the first in common, the longer two the first three."""
    wsd = {"train__schedule": "warmup_stable_decay", "train__warmup_steps": 1, "train__decay": 0.5}
    return made_spec(train__epochs=epochs, **wsd | fields)


TRUNK = {f"e{epochs}": trunk(epochs) for epochs in (1, 2, 3)}


@dataclass
class Course:
    """What a trial was at each step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    """By step."""
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    last: TrialReport | None = None

    def __len__(self) -> int:
        return len(self.losses)


def alone(directory: Path, rows: Any, validation_rows: Any, spec: JobSpec, place: Place | None = None) -> Course:
    """The same trial as a run of its own, validating after every step."""
    place, found = place or Place(), Course()
    network = load_model(directory, dtype=DTYPES[spec.train.dtype], device=place.device)
    add_adapter(network, SLOT, lora_shape(spec.tuning), spec.train.seed)
    parameters = adapter_parameters(network, SLOT)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    network.gradient_checkpointing = spec.train.gradient_checkpointing
    batches = make_batches(spec, rows.lengths, network, place)

    def validate(progress: Progress) -> None:
        if validation_rows is not None:
            cut = validation_batches(validation_rows.lengths, network, place, spec.train)
            found.validation[progress.step] = mean_loss(network, validation_rows, cut, device=place.device)

    def on_step(progress: Progress) -> None:
        found.losses.append(progress.loss)
        found.norms.append(progress.grad_norm)
        found.rates.append(progress.learning_rate)
        found.tokens.append(progress.tokens)
        weights = adapter_tensors(network, SLOT)
        found.weights.append({name: value.to("cpu", copy=True) for name, value in weights.items()})

    train(
        network, SingleEngine(parameters, spec.train), rows, batches, learning_rates(spec.train, batches.total_steps),
        seed=spec.train.seed, progress=Progress(0, batches.total_steps),
        hooks=Hooks(on_step=on_step, validate=validate, validate_every=1),
        device=place.device, share=spec.tuning.dropout == 0.0,
    )  # fmt: skip
    return found


def group_of(
    directory: Path,
    rows: Any,
    validation_rows: Any = None,
    *,
    tokens_at_once: int = 400,
    lanes: int = 16,
    dtype: torch.dtype = torch.float32,
    place: Place | None = None,
    network: Any = None,
) -> PackedGroup:
    place = place or Place()
    network = network or load_model(directory, dtype=dtype, device=place.device)
    return PackedGroup(network, rows, validation_rows, place, tokens_at_once=tokens_at_once, lanes=lanes)


def follow(group: PackedGroup, courses: dict[str, Course], steps: int = 1000) -> dict[str, Course]:
    """Take steps until nothing is left to do, and write down what the group says of each trial."""
    for _ in range(steps):
        reports = group.step()
        if not reports:
            break
        for report in reports:
            course = courses.setdefault(report.trial, Course())
            course.last = report
            if report.state == "diverged":
                continue
            assert report.step == len(course) + 1
            course.losses.append(report.loss)
            course.norms.append(report.grad_norm)
            course.rates.append(report.learning_rate)
            course.tokens.append(report.tokens)
            if report.validation_loss is not None:
                course.validation[report.step] = report.validation_loss
            course.weights.append(group.adapter(report.trial))
    return courses


def packed(group: PackedGroup, specs: dict[str, JobSpec]) -> dict[str, Course]:
    """All trials, opened together, to their end."""
    for trial, spec in specs.items():
        group.open(trial, spec)
    return follow(group, {})


def same(one: Course, other: Course) -> bool:
    """To the last bit, at every step."""
    return (one.losses, one.norms, one.rates, one.tokens) == (
        other.losses,
        other.norms,
        other.rates,
        other.tokens,
    ) and all(
        torch.equal(mine[name], theirs[name])
        for mine, theirs in zip(one.weights, other.weights, strict=True)
        for name in mine.keys() | theirs.keys()
    )


def check_close(found: Course, expected: Course, *, loss: float = 1e-5, weight: float = 1e-5) -> None:
    """Losses and weights at every step."""
    assert len(found) == len(expected)
    assert found.losses == pytest.approx(expected.losses, abs=loss)
    assert found.norms == pytest.approx(expected.norms, rel=1e-2 if loss > 1e-4 else 1e-3, abs=loss)
    assert (found.rates, found.tokens) == (expected.rates, expected.tokens)
    for step, loss_there in found.validation.items():
        assert loss_there == pytest.approx(expected.validation[step], abs=loss)
    for mine, theirs in zip(found.weights, expected.weights, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], atol=weight, rtol=0, msg=name)


@pytest.fixture
def place(device: str) -> Place:
    """One worker."""
    return Place(device=torch.device(device))


@pytest.fixture
def rows(make_rows: Callable[..., MadeRows]) -> MadeRows:
    """Twelve rows without a common beginning."""
    return make_rows(LENGTHS)


@pytest.fixture
def alike_rows(make_rows: Callable[..., MadeRows]) -> MadeRows:
    """Twelve rows that begin with the same four tokens, as with one system prompt."""
    made = make_rows([length + 4 for length in LENGTHS], seed=1)
    for row in made.rows:
        row.ids[:4] = np.array([5, 6, 7, 8])
        row.loss_mask[:5] = False
    return made


@pytest.fixture
def validation_rows(make_rows: Callable[..., MadeRows]) -> MadeRows:
    return make_rows([20, 11, 31, 8], seed=2)


def broken_lane(group: PackedGroup, trial: str, value: float) -> None:
    """Fill every weight of the lane that a trial rides."""
    (slot,) = [lane.slot for lane in group._lanes for course in lane.courses if course.trial == trial]
    with torch.no_grad():
        for name, parameter in group._network.named_parameters():
            if name.endswith(f"_{slot}"):
                parameter.fill_(value)
