"""What surrounds the start of a head; the start itself is in tests/integration. About a second."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import connect_if_running, local
from cluster.processes import MARKER, end, members, running
from orchestrator.errors import ClusterError
from orchestrator.settings import Settings


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a cluster's marker and a child of its own."""
    code = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '60'], env={}); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={MARKER: uuid.uuid4().hex}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    for child in psutil.Process(process.pid).children() if process.poll() is None else []:
        child.kill()
    process.kill()
    process.wait()
    process.stdout.close()


def _marker(process: subprocess.Popen[bytes]) -> str:
    return psutil.Process(process.pid).environ()[MARKER]


def _record(settings: Settings, pid: int, created: float) -> None:
    settings.home.mkdir(parents=True, exist_ok=True)
    head = local.HeadProcess(pid=pid, created=created, name="raylet")
    cluster = local.LocalCluster(
        id=uuid.uuid4().hex,
        address="http://127.0.0.1:9",
        gcs_address="127.0.0.1:9",
        session_dir=str(settings.home / "ray/s/session_x"),
        token_path=str(settings.keys / "ray_token"),
        processes=[head],
        started_at=time.time(),
    )
    (settings.home / "cluster.json").write_text(cluster.model_dump_json())


# --- processes ------------------------------------------------------------------------------------------------------


def test_a_head_is_its_marked_processes_and_their_children(sleeper: subprocess.Popen[bytes]) -> None:
    found = members(_marker(sleeper), "")
    assert [p.pid for p in found] == [sleeper.pid, psutil.Process(sleeper.pid).children()[0].pid]


def test_another_head_is_left_alone(sleeper: subprocess.Popen[bytes]) -> None:
    assert members(uuid.uuid4().hex, "/tmp/no-such-session") == []


def test_ending_ends_children_too(sleeper: subprocess.Popen[bytes]) -> None:
    found = members(_marker(sleeper), "")
    assert end(found) == []
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in found)


def test_a_pid_that_was_given_to_another_process_is_not_the_head() -> None:
    created = psutil.Process().create_time()
    assert running(os.getpid(), created)
    assert not running(os.getpid(), created - 100)


# --- the record -----------------------------------------------------------------------------------------------------


def test_a_head_that_died_is_not_found(home: Path) -> None:
    settings = Settings()
    assert local.find(settings) is None
    _record(settings, os.getpid(), psutil.Process().create_time())
    assert local.find(settings) is not None
    _record(settings, os.getpid(), psutil.Process().create_time() - 100)
    assert local.find(settings) is None
    assert connect_if_running(settings) is None


def test_stopping_a_head_that_died_clears_its_record(home: Path) -> None:
    settings = Settings()
    _record(settings, os.getpid(), 0)
    assert local.stop(settings)
    assert not local.stop(settings)


def test_a_damaged_record_is_said(home: Path) -> None:
    settings = Settings()
    home.mkdir()
    (home / "cluster.json").write_text("{")
    with pytest.raises(ClusterError, match=r"cluster\.json is damaged"):
        local.find(settings)


def test_a_head_that_does_not_answer_is_said_and_not_replaced(home: Path) -> None:
    settings = Settings()
    _record(settings, os.getpid(), psutil.Process().create_time())
    local._make_token(settings.keys / "ray_token")
    with pytest.raises(ClusterError, match="runs but does not answer"):
        local.start(settings)
    assert (home / "cluster.json").exists()


# --- what it is started with ----------------------------------------------------------------------------------------


def test_the_token_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "ray_token"
    local._make_token(path)
    first = path.read_text()
    assert len(first) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    local._make_token(path)
    assert path.read_text() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_old_token_in_the_environment_does_not_reach_the_head(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "old")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("no_proxy", "corp.example")
    environment = local._environment(Settings(), "id", home / "keys" / "ray_token")
    assert "RAY_AUTH_TOKEN" not in environment
    assert "RAY_ADDRESS" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["no_proxy"] == "corp.example,127.0.0.1,localhost"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_sockets_fit_below_a_long_home(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    inside = local._temp_dir(Path(f"/tmp/a{uuid.uuid4().hex[:6]}"))
    outside = local._temp_dir(long)
    try:
        assert inside.parts[-2:] == ("ray", "s")
        for path in (inside, outside):
            assert len(str(path)) + local._SESSION_PATH_LENGTH <= local._SOCKET_PATH_LIMIT
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert local._temp_dir(long) == outside
        assert local._temp_dir(tmp_path / ("y" * 100)) != outside
    finally:
        for path in (inside, outside, local._temp_dir(tmp_path / ("y" * 100))):
            path.rmdir()
            path.parent.rmdir()
        inside.parents[1].rmdir()


def test_only_the_last_sessions_are_kept(tmp_path: Path) -> None:
    for day in range(1, 7):
        (tmp_path / f"session_2026-11-0{day}").mkdir()
    local._forget_old_sessions(tmp_path)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["5", "6"]


def test_ports_differ() -> None:
    assert len(set(local._free_ports(20))) == 20
