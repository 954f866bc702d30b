"""A packed group goes on from a snapshot as if it had never stopped, wherever it was killed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.sweep import snapshots
from jobs.sweep.packed import PackedGroup
from jobs.train.setup import Place
from tests.unit.sweep.conftest import (
    MIXED,
    TRUNK,
    Models,
    follow,
    group_of,
    same,
    trunk,
)

SNAPPED = {name: MIXED[name] for name in ("plain", "rank", "batch", "dropout", "adam")} | TRUNK


@pytest.mark.parametrize("done", [0, 1, 2, 4, 7])
def test_a_group_goes_on_from_a_snapshot_to_the_last_digit(
    tiny_model: Models, rows: Any, validation_rows: Any, place: Place, tmp_path: Path, done: int
) -> None:
    """With trials that ride together, wait for a lane, have finished, and come after it."""
    directory, results = tiny_model("llama"), []
    for killed in (False, True):
        group = group_of(directory, rows, validation_rows, lanes=6, place=place)
        for trial, spec in SNAPPED.items():
            group.open(trial, spec)
        found = follow(group, {}, steps=done)
        if killed:
            snapshots.write(tmp_path, group.snapshot())
            before = copy.deepcopy((group.steps, group.finished, group.computed, group.alone))
            group.step()  # is lost
            group = group_of(directory, rows, validation_rows, lanes=6, place=place)
            assert group.restore(tmp_path)
            assert (group.steps, group.finished, group.computed, group.alone) == before
        if group.free:
            group.open("late", MIXED["seed"])
        results.append((follow(group, found), group))
    (undisturbed, one), (resumed, two) = results
    assert undisturbed.keys() == resumed.keys()
    for trial in undisturbed:
        assert same(undisturbed[trial], resumed[trial]), trial
        assert undisturbed[trial].validation == resumed[trial].validation
    assert (one.computed, one.alone) == (two.computed, two.alone)
    for trial in one.finished:
        assert all(torch.equal(t, two.adapter(trial)[name]) for name, t in one.adapter(trial).items())


def test_those_that_wait_to_go_on_together_still_do(tiny_model: Models, rows: Any, tmp_path: Path) -> None:
    group = group_of(tiny_model("llama"), rows, lanes=3)
    for trial, spec in {f"e{n}-{rate}": trunk(n, train__learning_rate=rate) for rate in (1, 2) for n in (1, 2)}.items():
        group.open(trial, spec)
    group.step()
    group.step()
    assert group.free == 1
    snapshots.write(tmp_path, group.snapshot())
    again = group_of(tiny_model("llama"), rows, lanes=3)
    assert again.restore(tmp_path)
    for _ in range(3):
        assert again.steps == group.steps
        group.step()
        again.step()
    assert again.steps == group.steps == {"e1-1": 3, "e1-2": 3, "e2-1": 3, "e2-2": 3}


def test_how_rows_are_cut_is_part_of_a_snapshot(
    tiny_model: Models, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finds another amount of memory free."""
    from jobs.sweep import packed as module

    def cuts(group: PackedGroup) -> list[list[int]]:
        return group._lanes.seated[0].course.batches.micro_batches(1, 0)

    directory = tiny_model("llama")
    monkeypatch.setattr(module, "agreed_micro_batch_tokens", lambda *a: 30)
    group = group_of(directory, rows)
    group.open("a", MIXED["plain"])
    group.step()
    snapshots.write(tmp_path, group.snapshot())
    monkeypatch.setattr(module, "agreed_micro_batch_tokens", lambda *a: 300)
    again = group_of(directory, rows)
    assert again.restore(tmp_path)
    assert cuts(again) == cuts(group)
    assert len(cuts(group)) > 1


def test_without_a_snapshot_there_is_nothing_to_go_on_from(tiny_model: Models, rows: Any, tmp_path: Path) -> None:
    group = group_of(tiny_model("llama"), rows)
    assert not group.restore(tmp_path)
    assert not group.restore(tmp_path / "nowhere")


def test_a_snapshot_that_was_cut_off_leaves_the_one_before(
    tiny_model: Models, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file operation in turn."""
    directory = tiny_model("llama")
    group = group_of(directory, rows)
    group.open("a", MIXED["plain"])
    group.step()
    snapshots.write(tmp_path, group.snapshot())
    group.step()

    class Killed(Exception):
        pass

    def half(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise Killed

    def dies(*_: Any) -> None:
        raise Killed

    for owner, operation, replacement in (
        (snapshots, "save_file", half),
        (Path, "write_text", dies),
        (Path, "replace", dies),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, operation, replacement)
            with pytest.raises(Killed):
                snapshots.write(tmp_path, group.snapshot())
        again = group_of(directory, rows)
        assert again.restore(tmp_path)
        assert again.steps == {"a": 1}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", dies)
        with pytest.raises(Killed):
            snapshots.write(tmp_path, group.snapshot())
    again = group_of(directory, rows)
    assert again.restore(tmp_path)
    assert again.steps == {"a": 2}
    snapshots.write(tmp_path, group.snapshot())
    assert len(list(tmp_path.iterdir())) == 2  # what was cut off is swept up
