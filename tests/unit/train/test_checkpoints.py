"""Checkpoints are complete or not there, and the right ones are kept. 2 seconds."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train.checkpoints import Checkpoints
from jobs.train.control import Control
from jobs.train.engines import State
from orchestrator.errors import StoreError, Superseded
from orchestrator.spec.job import CheckpointSpec
from orchestrator.store import Store, attempt_path, checkpoint_path, checkpoints_path, control_path

RUN = "run-1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def state(number: float) -> State:
    return {kind: {"w": torch.full((3,), number + n)} for n, kind in enumerate(("weights", "exp_avg", "exp_avg_sq"))}


class Said:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, text: str, level: str = "info", **_: Any) -> None:
        self.lines.append((level, text))

    @property
    def warnings(self) -> list[str]:
        return [text for level, text in self.lines if level == "warn"]


def checkpoints(store: Store, said: Said | None = None, attempt: int = 1, **keep: Any) -> Checkpoints:
    return Checkpoints(store, RUN, attempt, CheckpointSpec(**keep), said or Said())


def kept(store: Store) -> list[int]:
    return [int(name) for name in store.children(checkpoints_path(RUN))]


def test_what_was_saved_is_what_comes_back(store: Store) -> None:
    one = checkpoints(store)
    one.save(7, state(7.0), {"tokens": 12, "validation_loss": 0.5}, wait=True)
    found = checkpoints(store).latest()
    assert found is not None
    step, held, facts = found
    assert step == 7
    assert facts["tokens"] == 12
    assert all(torch.equal(held[kind]["w"], state(7.0)[kind]["w"]) for kind in held)


def test_without_any_there_is_none(store: Store) -> None:
    assert checkpoints(store).latest() is None


def test_the_last_few_and_the_best_are_kept(store: Store) -> None:
    saved = checkpoints(store, keep_last=2)
    for step, loss in ((2, 0.9), (4, 0.3), (6, 0.5), (8, 0.6), (10, 0.7)):
        saved.save(step, state(step), {"validation_loss": loss}, wait=True)
    assert kept(store) == [4, 8, 10]


def test_the_best_goes_when_it_is_not_asked_for(store: Store) -> None:
    saved = checkpoints(store, keep_last=1, keep_best=False)
    for step, loss in ((2, 0.1), (4, 0.3), (6, None)):
        saved.save(step, state(step), {"validation_loss": loss}, wait=True)
    assert kept(store) == [6]


def test_steps_are_ordered_as_numbers(store: Store) -> None:
    saved = checkpoints(store, keep_last=2)
    for step in (9, 10, 99, 100, 1000):
        saved.save(step, state(step), {}, wait=True)
    assert kept(store) == [100, 1000]
    assert saved.latest()[0] == 1000  # type: ignore[index]


def test_one_that_was_never_completed_does_not_exist(store: Store) -> None:
    checkpoints(store).save(2, state(2.0), {}, wait=True)
    store.write(f"{checkpoint_path(RUN, 4)}/weights.safetensors", b"half of it")
    assert checkpoints(store).latest()[0] == 2  # type: ignore[index]


def test_one_that_lost_a_file_is_passed_over_and_named(store: Store) -> None:
    said = Said()
    saved = checkpoints(store, said)
    for step in (2, 4):
        saved.save(step, state(step), {}, wait=True)
    store.delete(f"{checkpoint_path(RUN, 4)}/exp_avg.safetensors")
    assert saved.latest()[0] == 2  # type: ignore[index]
    assert len(said.warnings) == 1


@pytest.mark.parametrize("what", ["weights.safetensors", "exp_avg.safetensors", "manifest.json"])
def test_a_damaged_one_is_passed_over_and_named(store: Store, what: str) -> None:
    said = Said()
    saved = checkpoints(store, said)
    saved.save(2, state(2.0), {}, wait=True)
    saved.save(4, state(4.0), {}, wait=True)
    path = f"{checkpoint_path(RUN, 4)}/{what}"
    assert store.exists(path)
    data = bytearray(store.read(path))
    data[len(data) // 2] ^= 0x01 if what != "manifest.json" else 0xFF
    store.write(path, bytes(data))
    assert saved.latest()[0] == 2  # type: ignore[index]
    assert len(said.warnings) == 1
    assert "damaged" in said.warnings[0]


def test_a_store_that_fails_in_the_middle_leaves_the_one_before(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    saved = checkpoints(store, said, keep_last=1)
    saved.save(2, state(2.0), {}, wait=True)
    upload = store._upload

    def second_fails(local: Path, path: str, **options: Any) -> None:
        if path.endswith("exp_avg.safetensors"):  # files go in the order of their names, so two are still to come
            raise StoreError("No space left on device")
        upload(local, path)

    monkeypatch.setattr(store, "_upload", second_fails)
    saved.save(4, state(4.0), {}, wait=True)
    assert "No space left" in said.warnings[0]
    assert saved.latest()[0] == 2  # type: ignore[index]
    monkeypatch.setattr(store, "_upload", upload)
    saved.save(6, state(6.0), {}, wait=True)
    assert saved.latest()[0] == 6  # type: ignore[index]


def test_an_attempt_that_was_replaced_writes_nothing_and_stops(store: Store) -> None:
    old = checkpoints(store, attempt=1)
    store.write_json(attempt_path(RUN), {"attempt": 2})
    old.save(2, state(2.0), {})
    with pytest.raises(Superseded):
        old.wait()
    assert kept(store) == []
    checkpoints(store, attempt=2).save(2, state(2.0), {}, wait=True)
    assert kept(store) == [2]


def test_uploads_do_not_hold_up_the_loop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns while its upload is held; the next one waits for it."""
    go = threading.Event()
    upload = store._upload

    def held(local: Path, path: str, **options: Any) -> None:
        assert go.wait(30)
        upload(local, path, **options)

    monkeypatch.setattr(store, "_upload", held)
    saved = checkpoints(store)
    saved.save(2, state(2.0), {})
    assert saved.latest() is None  # returned before it was complete
    go.set()
    saved.save(4, state(4.0), {})
    saved.finish()
    assert kept(store) == [2, 4]


@pytest.mark.parametrize("action", ["pause", "cancel"])
def test_a_wish_in_the_store_is_seen(store: Store, action: str) -> None:
    store.write_json(control_path(RUN, 1), {"action": action})
    control = Control(store, RUN, 1)
    control.close()
    assert control.wish == action


def test_another_attempts_wish_is_not_ours(store: Store) -> None:
    store.write_json(control_path(RUN, 1), {"action": "pause"})
    control = Control(store, RUN, 2)
    control.close()
    assert control.wish is None


def test_an_attempt_that_was_replaced_wishes_to_end(store: Store) -> None:
    store.write_json(attempt_path(RUN), {"attempt": 3})
    control = Control(store, RUN, 2)
    control.close()
    assert control.wish == "cancel"


# --- several ranks --------------------------------------------------------------------------------------------------


def agreed(stores: list[Store]) -> Any:
    return lambda place: checkpoints(stores[place.rank]).agreed(place)


def damage(store: Store, step: int) -> None:
    store.write(f"{checkpoint_path(RUN, step)}/weights.safetensors", b"other bytes")


@pytest.fixture
def two_stores(tmp_path: Path) -> list[Store]:
    """Each rank's own, with checkpoints 2 and 4 in both."""
    stores = [Store(str(tmp_path / f"rank{rank}")) for rank in range(2)]
    for one in stores:
        for step in (2, 4):
            checkpoints(one).save(step, state(step), {"tokens": step}, wait=True)
    return stores


def test_a_rank_that_sees_a_newer_checkpoint_follows_rank_0(two_stores: list[Store], as_ranks: Any) -> None:
    checkpoints(two_stores[1]).save(6, state(6.0), {}, wait=True)
    first, second = as_ranks(2, agreed(two_stores))
    assert (first[0], second[0]) == (4, 4)
    assert second[2]["tokens"] == 4
    assert torch.equal(second[1]["weights"]["w"], state(4.0)["weights"]["w"])


def test_what_rank_0_finds_damaged_nobody_goes_on_from(two_stores: list[Store], as_ranks: Any) -> None:
    damage(two_stores[0], 4)
    assert [found[0] for found in as_ranks(2, agreed(two_stores))] == [2, 2]


def test_where_rank_0_sees_none_all_begin_anew(two_stores: list[Store], as_ranks: Any) -> None:
    two_stores[0].delete(checkpoints_path(RUN))
    assert as_ranks(2, agreed(two_stores)) == [None, None]


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_rank_that_cannot_read_what_rank_0_reads_says_so(two_stores: list[Store], as_ranks: Any, how: str) -> None:
    if how == "damaged":
        damage(two_stores[1], 4)
    else:
        two_stores[1].delete(checkpoint_path(RUN, 4))
    first, second = as_ranks(2, agreed(two_stores))
    assert first[0] == 4
    assert isinstance(second, StoreError)
    assert second.message.startswith("Worker 1 cannot read the checkpoint at step 4, from which worker 0 goes on: ")
    assert str(two_stores[1].url) in second.message
    assert second.context == {"step": 4, "rank": 1}
