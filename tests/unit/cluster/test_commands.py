"""`up`, `down`, `status` and `doctor` without starting a cluster. About three seconds: doctor imports torch once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from cluster import doctor
from cluster.doctor import Check, Level, examine
from orchestrator.commands import cluster as commands
from orchestrator.errors import ClusterError
from orchestrator.settings import Settings

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
    facts = json.loads(run("up", "--json")[1])
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
    assert len(checks) == 13


def test_what_is_missing_but_optional_is_a_warning_that_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "bitsandbytes" else "1.0")
    _only(monkeypatch, "")
    found = {check.name: check for check in examine(Settings())}
    assert found["bitsandbytes"].level is Level.WARN
    assert "adaptory[qlora]" in found["bitsandbytes"].advice


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, "")
    monkeypatch.setattr(doctor, "_disk", lambda _: 1 / 0)
    checks = list(examine(Settings()))
    assert len(checks) == 13
    assert "ZeroDivisionError" in next(check.found for check in checks if check.name == "disk")


def test_doctor_says_when_a_remote_cluster_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTORY_RAY_ADDRESS", "http://127.0.0.1:9")
    _only(monkeypatch, "_cluster")
    code, out = run("doctor")
    assert code == 1
    assert "cannot be reached" in " ".join(out.split())
