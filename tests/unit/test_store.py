"""The store on a disk that is full, a real one of 16 MiB. Below a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import AdaptoryError, DiskFull
from orchestrator.store import Store


@pytest.fixture
def store(small_disk: Any) -> Store:
    return Store(str(small_disk.path / "store"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "weights").write_bytes(b"w" * 2**20)
    return path


def test_a_full_disk_is_named_with_what_is_free_and_loses_nothing(
    store: Store, small_disk: Any, directory: Path, tmp_path: Path
) -> None:
    store.publish("adapters/one", directory)
    store.write_json("runs/r/result.json", {"attempt": 1})
    small_disk.fill()
    for refused in (
        lambda: store.publish("adapters/two", directory),
        lambda: store.write_json("runs/r/result.json", {"attempt": 2, "text": "x" * 10_000}),
        lambda: store.put_file(directory / "weights"),
    ):
        with pytest.raises(DiskFull) as caught:
            refused()
        error = caught.value
        assert error.message.startswith(f"There is no room for {small_disk.path}/store/")
        assert error.message.endswith(" of the disk's 16.0 MiB are free.")
        assert error.context["free"] < 2**16
        assert error.context["total"] == 16 * 2**20
        assert "Free some space" in str(error.hint)
        assert isinstance(AdaptoryError.from_dict(error.to_dict()), DiskFull)
    assert store.manifest("adapters/two") is None
    assert store.read_json("runs/r/result.json") == {"attempt": 1}
    store.fetch("adapters/one", tmp_path / "back")
    small_disk.free()
    store.publish("adapters/two", directory)
    assert not list(small_disk.path.rglob(".tmp-*"))


@pytest.mark.parametrize("on_the_same_disk", [True, False])
def test_what_may_go_is_moved_and_read_back_whole(
    small_disk: Any, directory: Path, tmp_path: Path, on_the_same_disk: bool
) -> None:
    store = Store(str((tmp_path if on_the_same_disk else small_disk.path) / "store"))
    store.publish("checkpoints/1", directory, {"step": 1}, move=True)
    assert (directory / "weights").exists() is not on_the_same_disk, "else it was written twice"
    manifest = store.fetch("checkpoints/1", tmp_path / "back")
    assert manifest.metadata == {"step": 1}
    assert (tmp_path / "back" / "weights").read_bytes() == b"w" * 2**20
