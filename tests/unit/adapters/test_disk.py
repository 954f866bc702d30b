"""The disk tier among threads, processes and full disks. About 10 seconds."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import AdapterCacheFull, AdapterLoadTimeout, StoreError
from serving.adapters.disk import DiskTier, Source


def name(number: int) -> str:
    return f"sha256:{number:064x}"


def source(size: int = 1000, content: bytes = b"x", pause: float = 0.0) -> Source:
    def copy(directory: Path) -> None:
        time.sleep(pause)
        (directory / "weights").write_bytes(content * size)

    return Source(size, copy)


def never() -> Source:
    raise AssertionError("it is here already")


def held(disk: DiskTier) -> set[int]:
    return {int(path.name, 16) for path in disk.root.iterdir() if path.is_dir() and not path.name.startswith(".")}


def test_it_is_fetched_once_however_many_ask(tmp_path):
    fetches, disks = [], [DiskTier(tmp_path / "disk", 10_000) for _ in range(2)]

    def find() -> Source:
        fetches.append(threading.get_ident())
        return source(pause=0.1)

    def ask(disk: DiskTier) -> None:
        with disk.open(name(1), find) as (directory, _):
            assert (directory / "weights").read_bytes() == b"x" * 1000

    threads = [threading.Thread(target=ask, args=(disks[n % 2],)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetches) == 1
    assert sum(disk.metrics.hits for disk in disks) == 15
    assert sum(disk.metrics.fetches for disk in disks) == 1


def _fetch_in_another_process(root: Path, log: Path, number: int) -> None:
    def find() -> Source:
        with log.open("a") as stream:
            stream.write(f"{number}\n")
        return source(pause=0.05)

    with DiskTier(root, 3000).open(name(number), find) as (directory, _):
        assert len((directory / "weights").read_bytes()) == 1000
        time.sleep(0.05)


def test_processes_share_it_and_fetch_once(tmp_path):
    """Three adapters, each asked for by two processes."""
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [
        context.Process(target=_fetch_in_another_process, args=(tmp_path / "disk", log, n % 3)) for n in range(6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert sorted(log.read_text().split()) == ["0", "1", "2"]


def test_the_least_recently_used_makes_room(tmp_path):
    disk = DiskTier(tmp_path / "disk", 3000)
    for number in (1, 2, 3, 1, 4):
        with disk.open(name(number), source):
            time.sleep(0.02)  # the file system's clock is coarse
    assert held(disk) == {1, 3, 4}
    assert disk.metrics.evictions == 1
    assert disk.used == 3000
    assert not (disk.root / f".lock-{2:064x}").exists()


def test_nothing_is_removed_under_a_reader(tmp_path):
    disk = DiskTier(tmp_path / "disk", 2000, patience=0.1)
    with disk.open(name(1), source) as (first, _), disk.open(name(2), source):
        with pytest.raises(AdapterCacheFull, match="in use"), disk.open(name(3), source):
            pass
        with pytest.raises(AdapterLoadTimeout):
            disk.discard(name(1))
        assert (first / "weights").stat().st_size == 1000
    with disk.open(name(3), source):
        assert len(held(disk)) == 2


def test_what_is_being_fetched_counts(tmp_path):
    disk, inside, go_on = DiskTier(tmp_path / "disk", 1500), threading.Event(), threading.Event()

    def slow(directory: Path) -> None:
        inside.set()
        go_on.wait(20)
        source().copy(directory)

    def fetch() -> None:
        with disk.open(name(1), lambda: Source(1000, slow)):
            pass

    thread = threading.Thread(target=fetch)
    thread.start()
    assert inside.wait(20)
    with pytest.raises(AdapterCacheFull), disk.open(name(2), source):
        pass
    go_on.set()
    thread.join()
    assert held(disk) == {1}


def test_a_failed_fetch_leaves_nothing_and_costs_nothing(tmp_path):
    disk = DiskTier(tmp_path / "disk", 2000)
    with disk.open(name(1), source):
        pass

    def fails(directory: Path) -> None:
        (directory / "weights").write_bytes(b"half")
        raise StoreError("gone")

    with pytest.raises(StoreError, match="gone"), disk.open(name(2), lambda: Source(1000, fails)):
        pass
    assert held(disk) == {1}
    assert {path.name for path in disk.root.iterdir()} == {f"{1:064x}", f".lock-{1:064x}", ".lock-budget"}


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    root = tmp_path / "disk"
    code = f"""
import os, signal
from pathlib import Path
from serving.adapters.disk import DiskTier, Source
def copy(directory):
    (directory / "weights").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
with DiskTier(Path({str(root)!r}), 1000).open({name(1)!r}, lambda: Source(1000, copy)):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    assert done.returncode == -9
    assert any(path.name.startswith(".tmp-") for path in root.iterdir())
    disk = DiskTier(root, 1000, patience=5)
    with disk.open(name(2), source):
        assert held(disk) == {2}, "the killed one's room was given back"
    with disk.open(name(1), source):
        assert held(disk) == {1}
    assert not any(path.name.startswith(".tmp-") for path in root.iterdir())


@pytest.mark.parametrize("room", ["after one more is given up", "not even then"])
def test_a_full_disk(tmp_path, room):
    """A real tmpfs of 64 KiB, smaller than the budget: ENOSPC comes from the writes."""
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(root)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs root and CAP_SYS_ADMIN to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        disk = DiskTier(root, 1 << 20)
        with disk.open(name(1), lambda: source(30_000)):
            pass
        if room == "not even then":
            with disk.open(name(1), never) as (kept, _):
                with pytest.raises(AdapterCacheFull), disk.open(name(2), lambda: source(50_000)):
                    pass
                assert (kept / "weights").stat().st_size == 30_000
            assert held(disk) == {1}
        else:
            with disk.open(name(2), lambda: source(50_000)) as (directory, fetched):
                assert fetched
                assert (directory / "weights").stat().st_size == 50_000
            assert held(disk) == {2}
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_another_error_of_the_system_is_not_taken_for_a_full_disk(tmp_path):
    disk = DiskTier(tmp_path / "disk", 3000)
    with disk.open(name(1), source):
        pass

    def fails(directory: Path) -> None:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"), disk.open(name(2), lambda: Source(1000, fails)):
        pass
    assert held(disk) == {1}
