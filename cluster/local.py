"""The local Ray: one head for each ADAPTORY_HOME, on loopback, behind a token, on ports of its own.

What `ray start --head` would otherwise do, and why each thing is set differently here:
- it listens on every interface without a token, unless one exists *before* (Ray ≥ 2.59 makes one for `ray.init` only);
- it takes the node's outside address even when told 127.0.0.1. `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0` is its way on a
  Mac, and makes all of it stay on loopback on Linux too (seen with `ss -ltn` on 2.60);
- its metrics ports are fixed, open to all and not covered by the token, so metrics are off;
- its ports are fixed (6379, 8265, 52365), so two homes would collide: free ones are chosen, and `cluster.json` says
  which.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from cluster.dashboard import Dashboard
from cluster.processes import MARKER, end, members, running
from orchestrator.errors import ClusterError
from orchestrator.settings import Settings

_SOCKET_PATH_LIMIT = 107
_SESSION_PATH_LENGTH = len("/session_2026-11-22_05-04-14_337301_1234567/sockets/plasma_store.10")
_OBJECT_STORE_BYTES = 1 << 30
"""Tensors travel by gloo or NCCL and data by the store: Ray's default, a third of the memory, would be lost."""
_START_TIMEOUT_SECONDS = 120.0
_SESSIONS_KEPT = 3


class HeadProcess(BaseModel):
    pid: int
    created: float
    """Seconds since the epoch, to tell it from a later process with the same pid."""
    name: str


class LocalCluster(BaseModel):
    """`cluster.json`: the head that belongs to this home."""

    id: str
    address: str
    """Of the dashboard and the Jobs API."""
    gcs_address: str
    """For `ray.init(address=…)`."""
    session_dir: str
    token_path: str
    processes: list[HeadProcess]
    """The daemons that must all live: GCS, raylet, dashboard."""
    started_at: float
    """Seconds since the epoch."""

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(running(p.pid, p.created) for p in self.processes)

    def dashboard(self) -> Dashboard:
        try:
            token = Path(self.token_path).read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"The local Ray's token {self.token_path} cannot be read ({error.strerror}).",
                hint="Run `adaptory down`, then `adaptory up`: a new one is made.",
            ) from error
        return Dashboard(self.address, token, token_source=self.token_path)


def find(settings: Settings) -> LocalCluster | None:
    """The head recorded for this home, if all of it still runs."""
    recorded = _recorded(settings)
    return recorded if recorded and recorded.alive else None


def start(settings: Settings, *, say: Callable[[str], None] = lambda _: None) -> LocalCluster:
    """The local head, started unless it runs already. Two at once start one.

    Raises:
        ClusterError: Ray does not start, or the recorded head runs but does not answer.
    """
    with _lock(settings.home):
        if (cluster := find(settings)) is not None:
            _must_answer(cluster)
            return cluster
        if (stale := _recorded(settings)) is not None:
            end(members(stale.id, stale.session_dir))
            _file(settings).unlink(missing_ok=True)
        say("Starting a local Ray (a few seconds; `adaptory down` stops it)…")
        cluster = _launch(settings)
        _write_private(_file(settings), cluster.model_dump_json(indent=1))
        return cluster


def stop(settings: Settings) -> bool:
    """End the head of this home with everything it started; False when none was recorded.

    Raises:
        ClusterError: a process could not be ended.
    """
    with _lock(settings.home):
        cluster = _recorded(settings)
        if cluster is None:
            return False
        # Twice: what a dying worker started in between has the marker too.
        left = end(members(cluster.id, cluster.session_dir)) + end(members(cluster.id, cluster.session_dir))
        if left:
            raise ClusterError(
                f"Processes {', '.join(str(p.pid) for p in left)} of the local Ray do not end.",
                hint="They may wait for a disk; try `adaptory down` again.",
            )
        _file(settings).unlink(missing_ok=True)
        return True


# --- starting -------------------------------------------------------------------------------------------------------


def _launch(settings: Settings) -> LocalCluster:
    temp_dir = _temp_dir(settings.home)
    _forget_old_sessions(temp_dir)
    token_path = settings.keys / "ray_token"
    _make_token(token_path)
    log = temp_dir / "start.log"
    for last_try in (False, True):
        cluster_id = uuid.uuid4().hex
        gcs, dashboard, agent = _free_ports(3)
        environment = _environment(settings, cluster_id, token_path)
        try:
            code = _ray_start(temp_dir, log, environment, gcs, dashboard, agent)
            if code == 0:
                cluster = _describe(cluster_id, temp_dir, token_path, gcs, dashboard)
                _must_answer(cluster)
                return cluster
        except BaseException:
            end(members(cluster_id, ""))
            raise
        end(members(cluster_id, ""))
        # Somebody may have taken a port between the choice and the start; everything else fails twice.
        if last_try:
            raise ClusterError(
                f"The local Ray did not start: {_failure(log)}",
                hint=f"The whole output is in {log}; `adaptory doctor` checks the machine.",
                log=str(log),
            )
    raise AssertionError("unreachable")


def _ray_start(temp_dir: Path, log: Path, environment: dict[str, str], gcs: int, dashboard: int, agent: int) -> int:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--no-monitor", "--disable-usage-stats"]
    command += ["--log-style=record", "--log-color=false", f"--temp-dir={temp_dir}"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-agent-listen-port={agent}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    # A file, not a pipe: the daemons keep it open. A session of its own: Ctrl-C and a closed terminal do not reach it.
    with log.open("wb") as output:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=Path(__file__).parents[1],  # `-m` finds the hook here even where nothing is installed
                start_new_session=True,
                timeout=_START_TIMEOUT_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            output.write(f"\nnot up after {_START_TIMEOUT_SECONDS:.0f} s\n".encode())
            return 124


def _environment(settings: Settings, cluster_id: str, token_path: Path) -> dict[str, str]:
    """What the head and everything it starts inherits; S3 credentials reach local jobs this way and no other."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_TMPDIR")}
    no_proxy = ",".join(filter(None, [environment.get("no_proxy"), "127.0.0.1", "localhost"]))
    return environment | {
        MARKER: cluster_id,
        "ADAPTORY_HOME": str(settings.home),
        # A job says `python`: it must be this one.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_START_HOOK": "cluster.head.trim",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        # 15 for all workers by default: then training, at 19, would have almost a third of the cores while the server answers.
        "RAY_worker_niceness": "0",
        "DASHBOARD_METRIC_PORT": "0",
        # gRPC would send loopback through a proxy.
        "no_proxy": no_proxy,
        "NO_PROXY": no_proxy,
    }


def _describe(cluster_id: str, temp_dir: Path, token_path: Path, gcs: int, dashboard: int) -> LocalCluster:
    session_dir = str((temp_dir / "session_latest").resolve())
    daemons = []
    for process in members(cluster_id, session_dir):
        command = " ".join(process.cmdline()[:3])
        for name in ("gcs_server", "raylet/raylet", "dashboard/dashboard.py"):
            if name in command:
                daemons.append(HeadProcess(pid=process.pid, created=process.create_time(), name=Path(name).stem))
    return LocalCluster(
        id=cluster_id,
        address=f"http://127.0.0.1:{dashboard}",
        gcs_address=f"127.0.0.1:{gcs}",
        session_dir=session_dir,
        token_path=str(token_path),
        processes=daemons,
        started_at=time.time(),
    )


def _must_answer(cluster: LocalCluster) -> None:
    try:
        cluster.dashboard().version()
    except ClusterError as error:
        raise ClusterError(
            f"The local Ray runs but does not answer: {error.message}",
            hint=f"`adaptory down --force` and `adaptory up` start it anew; see {cluster.session_dir}/logs.",
        ) from error


def _failure(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error" in line or "not up" in line]
    return (telling or lines or ["it said nothing"])[-1][:400]


# --- files ----------------------------------------------------------------------------------------------------------


def _file(settings: Settings) -> Path:
    return settings.home / "cluster.json"


def _recorded(settings: Settings) -> LocalCluster | None:
    try:
        return LocalCluster.model_validate_json(_file(settings).read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, json.JSONDecodeError) as error:
        raise ClusterError(
            f"{_file(settings)} is damaged, so the local Ray it names cannot be found.",
            hint="End that Ray by hand if it runs, then remove the file.",
        ) from error


def _temp_dir(home: Path) -> Path:
    """Ray's session directory: in the home where Unix sockets' short paths allow it, else below /tmp.

    One level deeper than what is private to this user, since Ray opens its own directory to everybody (mode 777) and
    the object store's socket has no token.
    """
    private = home / "ray"
    if len(str(private / "s")) + _SESSION_PATH_LENGTH > _SOCKET_PATH_LIMIT:
        private = Path("/tmp") / f"adaptory-{os.getuid()}-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    if private.is_symlink() or private.stat().st_uid != os.getuid():
        most = _SOCKET_PATH_LIMIT - _SESSION_PATH_LENGTH - len("/ray/s")
        raise ClusterError(
            f"{private} belongs to somebody else, so Ray's files are not put there.",
            hint=f"Use a shorter ADAPTORY_HOME (at most {most} characters).",
        )
    private.chmod(0o700)
    temp_dir = private / "s"
    temp_dir.mkdir(exist_ok=True)
    return temp_dir


def _forget_old_sessions(temp_dir: Path) -> None:
    """Keep the logs of the last few heads only."""
    for session in sorted(temp_dir.glob("session_2*"))[: -(_SESSIONS_KEPT - 1)]:
        shutil.rmtree(session, ignore_errors=True)


def _make_token(path: Path) -> None:
    """A token only this user reads. It is kept, so that what holds it survives a restart of the head."""
    if not path.is_file() or len(path.read_text().strip()) < 32:
        _write_private(path, secrets.token_hex(32))
    path.chmod(0o600)


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".tmp-{uuid.uuid4().hex}")
    partial.touch(mode=0o600, exist_ok=False)  # private before there is anything to read
    partial.write_text(text)
    partial.replace(path)


def _free_ports(count: int) -> list[int]:
    """Free loopback ports, all different: each is held until the last one is found."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One start or stop at a time in this home; the kernel frees it when the process ends."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "cluster.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
