"""A packed group on two workers, or with passes beside each other in one, is what it is on one that computes them in turn."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.sweep import passes as passes_module
from jobs.sweep import snapshots
from jobs.sweep.packed import PackedGroup
from jobs.sweep.passes import Part
from jobs.sweep.planning import Pace, Way
from jobs.train.setup import Place, planned_batches
from orchestrator.errors import OutOfMemory
from tests.unit.sweep.conftest import (
    MIXED,
    TRUNK,
    Course,
    Models,
    alone,
    broken_lane,
    check_close,
    follow,
    group_of,
    made_spec,
    packed,
    same,
)

# --- passes beside each other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_at_once", [400, 8])
def test_passes_beside_each_other_change_no_trial(
    tiny_model: Models, rows: Any, validation_rows: Any, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    directory = tiny_model("llama")
    specs = {
        name: spec.model_copy(update={"train": spec.train.model_copy(update={"micro_batch_tokens": 60})})
        for name, spec in MIXED.items()
    }

    def most(spec: Any, sharing: int) -> int:
        cut = planned_batches(spec.train, rows.lengths, spec.train.micro_batch_tokens)
        micro_batches = [micro for step in range(cut.total_steps) for micro in cut.micro_batches(step, 0, sharing)]
        return max(int(rows.lengths[micro].sum()) for micro in micro_batches)

    def beside() -> tuple[PackedGroup, dict[str, Course]]:
        group = group_of(directory, rows, validation_rows, tokens_at_once=tokens_at_once)
        tried = {Way(): [2, 1, 1, 1, 1], Way(1, 2): [2, 2, 1, 1, 1], Way(2, 2): [2, 1e9, 1, 1, 2]}
        group.pace = Pace(cores=2, full=1, seen={way: [float(n) for n in seen] for way, seen in tried.items()})
        return group, packed(group, specs)

    lean: set[bool] = set()
    """Whether other threads' passes were."""
    largest = {True: 0, False: 0}
    """Tokens of a micro-batch, with dropout and without."""

    def run(network: Any, parts: list[Part], *arguments: Any) -> list[torch.Tensor]:
        if threading.current_thread() is not threading.main_thread() and torch.is_grad_enabled():
            lean.add(network.lean)
        for part in parts if torch.is_grad_enabled() else []:
            dropout = next(network.linears()).slots[part.slot].shape.dropout > 0
            largest[dropout] = max(largest[dropout], part.batch.real_tokens)
        return unseen(network, parts, *arguments)

    unseen = passes_module.run
    monkeypatch.setattr("jobs.sweep.packed.run", run)
    group, found = beside()
    assert lean == {True}, "some were computed by other threads"
    assert largest[False] == max(most(spec, 2) for spec in specs.values() if not spec.tuning.dropout)
    assert largest[True] == most(specs["dropout"], 1), "masks are each micro-batch's own"
    assert group.pace is not None
    assert group.pace.way(4) == Way(2, 2)
    assert torch.get_num_threads() == group._teams._cores, "whoever computes next has all cores"
    for trial, spec in specs.items():
        check_close(found[trial], alone(directory, rows, validation_rows, spec))
    _, again = beside()
    assert all(same(again[trial], found[trial]) for trial in specs)


def test_what_runs_out_of_memory_beside_others_is_told_when_they_have_ended(
    tiny_model: Models, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(tiny_model("llama"), rows, tokens_at_once=8)
    group.pace = Pace(cores=2, full=1, seen={Way(): [2, 1, 1, 1, 1], Way(1, 2): [2, 3, 1, 1, 1]})
    run, ended = passes_module.run, []

    def broken(network: Any, parts: Any, *more: Any) -> Any:
        if parts[0].lane == 0:
            raise OutOfMemory("none left", hint="")
        found = run(network, parts, *more)
        ended.append(parts[0].lane)
        return found

    monkeypatch.setattr("jobs.sweep.packed.run", broken)
    for n in range(4):
        group.open(f"t{n}", made_spec(train__seed=n))
    with pytest.raises(OutOfMemory, match="none left"):
        group.step()
    assert sorted(ended) == [1, 2, 3]


# --- several workers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_at_once", [400, 8])
def test_two_workers_are_one(
    tiny_model: Models, rows: Any, validation_rows: Any, as_ranks: Any, tokens_at_once: int
) -> None:
    """Losses and weights within 1e-5 of one worker's; between the two, to the last bit. `batch` leaves a worker without a row
    in some steps."""
    directory = tiny_model("llama")
    specs = {name: spec for name, spec in MIXED.items() if name != "dropout"} | TRUNK  # dropout is each worker's own
    specs |= {"single": made_spec(train__batch_size=1, train__epochs=0.5)}
    expected = packed(group_of(directory, rows, validation_rows), specs)

    def work(place: Place) -> dict[str, Course]:
        return packed(group_of(directory, rows, validation_rows, place=place, tokens_at_once=tokens_at_once), specs)

    first, second = as_ranks(2, work)
    for trial in specs:
        check_close(first[trial], expected[trial])
        assert same(first[trial], second[trial])
        assert first[trial].validation == second[trial].validation


@pytest.mark.timeout(60)
def test_a_worker_without_a_row_goes_the_way_that_the_others_go(tiny_model: Models, rows: Any, as_ranks: Any) -> None:
    """With a batch of one row, the second of two workers has nothing to compute, and still takes part in what is decided."""
    directory = tiny_model("llama")
    one = {"train__batch_size": 1, "train__epochs": 0.5}
    specs = {
        "a": made_spec(**one),
        "b": made_spec(train__learning_rate=5e-3, **one),
        "c": made_spec(train__seed=1, **one),
    }
    expected = packed(group_of(directory, rows), specs)

    def work(place: Place) -> dict[str, Course]:
        group = group_of(directory, rows, place=place)
        group.pace = Pace(cores=2)
        return packed(group, specs)

    first, second = as_ranks(2, work)
    for trial in specs:
        check_close(first[trial], expected[trial])
        assert same(first[trial], second[trial])


def test_two_workers_go_on_from_a_snapshot(tiny_model: Models, rows: Any, as_ranks: Any, tmp_path: Path) -> None:
    directory = tiny_model("llama")
    specs = {name: MIXED[name] for name in ("plain", "dropout")}

    def work(place: Place) -> list[dict[str, Course]]:
        group = group_of(directory, rows, place=place)
        for trial, spec in specs.items():
            group.open(trial, spec)
        halfway = follow(group, {}, steps=3)
        if place.rank == 0:
            snapshots.write(tmp_path, group.snapshot())
        place.gathered(0)  # rank 0 has written
        again = group_of(directory, rows, place=place)
        assert again.restore(tmp_path)
        steps = {trial: Course(losses=[0.0] * 3) for trial in specs}
        follow(again, steps)
        return [follow(group, halfway), steps]

    for undisturbed, resumed in as_ranks(2, work):
        for trial in specs:
            assert resumed[trial].losses[3:] == undisturbed[trial].losses[3:]


def test_a_trial_that_diverges_does_so_on_every_worker(tiny_model: Models, rows: Any, as_ranks: Any) -> None:
    """Broken on one of them only."""
    directory = tiny_model("llama")

    def work(place: Place) -> dict[str, Course]:
        group = group_of(directory, rows, place=place)
        for name in ("plain", "seed"):
            group.open(name, MIXED[name])
        found = follow(group, {}, steps=2)
        if place.rank == 1:
            broken_lane(group, "seed", math.nan)
        return follow(group, found)

    for found in as_ranks(2, work):
        assert found["seed"].last.state == "diverged"
        assert found["plain"].last.state == "finished"
