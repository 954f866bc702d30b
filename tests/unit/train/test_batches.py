"""Which rows make up each step: none skipped, none twice, whatever the workers. 2 seconds."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from jobs.train import setup
from jobs.train.batches import Batches
from orchestrator.spec.job import JobSpec

LENGTHS = some.lists(some.integers(1, 60), min_size=1, max_size=40)
OPTIONS = some.fixed_dictionaries(
    {
        "batch_size": some.integers(1, 12),
        "epochs": some.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 3.0]),
        "seed": some.integers(0, 5),
        "micro_batch_tokens": some.sampled_from([8, 40, 100]),
        "packing": some.booleans(),
        "uniform": some.booleans(),
    }
)


@given(LENGTHS, OPTIONS)
def test_every_row_is_seen_as_often_as_there_are_epochs(lengths: list[int], options: dict[str, Any]) -> None:
    batches = Batches(lengths, **options)
    seen = Counter(row for step in range(batches.total_steps) for row in batches.rows(step))
    assert seen.total() == max(1, round(len(lengths) * options["epochs"]))
    times = [seen[row] for row in range(len(lengths))]
    assert max(times) - min(times) <= 1
    if options["epochs"] == int(options["epochs"]):
        assert set(times) == {int(options["epochs"])}
    assert set(seen) <= set(range(len(lengths)))


@given(LENGTHS, OPTIONS, some.integers(1, 5))
def test_any_number_of_workers_shares_the_same_global_batch(
    lengths: list[int], options: dict[str, Any], workers: int
) -> None:
    alone, shared = Batches(lengths, **options), Batches(lengths, workers=workers, **options)
    assert alone.total_steps == shared.total_steps
    counts = set()
    for step in range(alone.total_steps):
        dealt = [shared.micro_batches(step, rank) for rank in range(workers)]
        rows = sorted(row for rank in dealt for micro in rank for row in micro)
        assert rows == sorted(alone.rows(step)) == sorted(row for m in alone.micro_batches(step, 0) for row in m)
        assert len({len(rank) for rank in dealt}) == 1  # or a collective would wait for ever
        counts.add(len(dealt[0]))
        if not options["packing"]:
            assert all(len(micro) <= 1 for rank in dealt for micro in rank)
    if options["uniform"]:
        assert len(counts) == 1


@given(LENGTHS, OPTIONS, some.integers(1, 4))
def test_a_micro_batch_is_never_much_above_its_limit(lengths: list[int], options: dict[str, Any], beside: int) -> None:
    batches = Batches(lengths, **options | {"packing": True, "uniform": False})
    most = options["micro_batch_tokens"] / beside + max(lengths)
    for step in range(batches.total_steps):
        found = batches.micro_batches(step, 0, beside)
        assert all(sum(lengths[row] for row in micro) <= most for micro in found)
        assert sorted(row for micro in found for row in micro) == sorted(batches.rows(step))


def test_epochs_are_shuffled_differently_and_repeatably() -> None:
    make = {"batch_size": 20, "epochs": 2.0}
    batches = Batches([5] * 20, seed=0, **make)  # type: ignore[arg-type]
    assert batches.rows(0) != batches.rows(1)
    assert batches.rows(0) == Batches([5] * 20, seed=0, **make).rows(0)  # type: ignore[arg-type]
    assert batches.rows(0) != Batches([5] * 20, seed=1, **make).rows(0)  # type: ignore[arg-type]


def test_max_steps_ends_early_and_never_prolongs() -> None:
    assert Batches([5] * 10, batch_size=5, epochs=3, seed=0, max_steps=2).total_steps == 2
    assert Batches([5] * 10, batch_size=5, epochs=3, seed=0, max_steps=99).total_steps == 6


def test_an_epoch_ends_with_the_step_that_completes_it() -> None:
    batches = Batches([5] * 10, batch_size=4, epochs=2.5, seed=0)
    assert [step for step in range(batches.total_steps + 1) if batches.ends_epoch(step)] == [3, 5]


def test_epoch_counts_passes_over_the_rows() -> None:
    batches = Batches([5] * 10, batch_size=4, epochs=1.5, seed=0)
    assert [batches.epoch(step) for step in range(batches.total_steps + 1)] == [0.0, 0.4, 0.8, 1.2, 1.5]


def test_ranks_that_find_different_amounts_of_free_memory_cut_the_rows_alike(
    as_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself, rank 1 would have cut these rows into four times as many micro-batches."""
    monkeypatch.setattr(setup, "micro_batch_tokens", lambda train, network, place, longest: (400, 100)[place.rank])
    spec = JobSpec.model_validate(
        {"name": "n", "base_model": "m", "data": {"train": "t"}, "train": {"batch_size": 16, "epochs": 1}}
    )
    lengths = np.random.default_rng(0).integers(5, 90, 64)
    network = SimpleNamespace(packs=True)
    first, second = as_ranks(2, lambda place: setup.make_batches(spec, lengths, network, place))
    seen: list[int] = []
    for step in range(first.total_steps):
        of_each = first.micro_batches(step, 0), second.micro_batches(step, 1)
        assert len(of_each[0]) == len(of_each[1]) > 2
        seen += [row for rank in of_each for micro in rank for row in micro]
    assert sorted(seen) == list(range(64))
