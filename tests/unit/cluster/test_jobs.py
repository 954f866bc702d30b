"""The Jobs API client, against a server that answers as Ray does. About a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.dashboard import Dashboard, ray_token
from cluster.jobs import RayJobClient
from orchestrator.errors import ClusterError
from orchestrator.runs.client import JobStatus

if TYPE_CHECKING:
    from conftest import FakeRay

ENTRY: dict[str, Any] = {"entrypoint": "python -m jobs.train", "env": {"A": "1"}, "metadata": {"run": "r"}}


def test_a_job_is_sent_with_the_code_and_reserves_no_cpu(fake_ray: FakeRay) -> None:
    fake_ray.client().submit("r-a1", **ENTRY)
    job = fake_ray.jobs["r-a1"]
    package = job["runtime_env"]["working_dir"].removeprefix("gcs://")
    assert fake_ray.packages[package][:2] == b"PK"
    assert job["runtime_env"]["env_vars"] == {"A": "1"}
    assert job["entrypoint_num_cpus"] == 0
    assert fake_ray.client().status("r-a1") == (JobStatus.PENDING, "waiting")


def test_the_same_code_is_uploaded_once(fake_ray: FakeRay) -> None:
    for number in (1, 2, 3):
        fake_ray.client().submit(f"r-a{number}", **ENTRY)
    assert len([r for r in fake_ray.requests if r.startswith("PUT")]) == 1


def test_a_submission_id_that_exists_is_left_as_it_is(fake_ray: FakeRay) -> None:
    client = fake_ray.client()
    client.submit("r-a1", **ENTRY)
    client.submit("r-a1", entrypoint="python other.py", env={}, metadata={})
    assert fake_ray.jobs["r-a1"]["entrypoint"] == "python -m jobs.train"


def test_losing_a_race_for_a_submission_id_is_no_error(fake_ray: FakeRay) -> None:
    fake_ray.client().submit("r-a1", **ENTRY)
    fake_ray.hide_next_status = True
    fake_ray.client().submit("r-a1", entrypoint="python other.py", env={}, metadata={})
    assert fake_ray.jobs["r-a1"]["entrypoint"] == "python -m jobs.train"


def test_a_refused_job_says_what_ray_said(fake_ray: FakeRay) -> None:
    with pytest.raises(ClusterError, match="RuntimeError: the agent is away"):
        fake_ray.client().submit("broken-a1", **ENTRY)


def test_an_unknown_job_has_no_status_no_logs_and_can_be_stopped(fake_ray: FakeRay) -> None:
    client = fake_ray.client()
    assert client.status("nobody") is None
    assert client.logs("nobody") == ""
    client.stop("nobody")


def test_stop_and_active(fake_ray: FakeRay) -> None:
    client = fake_ray.client()
    client.submit("r-a1", **ENTRY)
    client.submit("r-a2", **ENTRY)
    client.stop("r-a1")
    assert client.status("r-a1") == (JobStatus.STOPPED, "waiting")
    assert client.active() == ["r-a2"]


def test_a_wrong_token_is_named_by_its_source_and_not_shown(fake_ray: FakeRay) -> None:
    with pytest.raises(ClusterError, match="refuses the token from RAY_AUTH_TOKEN") as caught:
        fake_ray.client(token="not-this-one").status("r-a1")
    assert "not-this-one" not in str(caught.value)


def test_netrc_does_not_replace_the_token(fake_ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert fake_ray.client().describe()["ray"] == "2.60.0"


def test_a_proxy_is_not_asked_for_this_machine(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fake_ray.client().describe()["ray"] == "2.60.0"


@pytest.mark.parametrize("address", ["ray://host:10001", "host:8265", "http://", "8265"])
def test_what_is_no_dashboard_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="not the address of a Ray dashboard"):
        Dashboard(address)


def test_an_unreachable_cluster_is_named() -> None:
    with pytest.raises(ClusterError, match=r"http://127\.0\.0\.1:9 cannot be reached") as caught:
        RayJobClient(Dashboard("http://127.0.0.1:9"), local=False).status("r-a1")
    assert "ADAPTORY_RAY_ADDRESS" in (caught.value.hint or "")


def test_dead_nodes_do_not_count(fake_ray: FakeRay) -> None:
    assert [row["node_id"] for row in fake_ray.client().dashboard.nodes()] == ["a"]


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert ray_token()[0] is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("third\n")
    assert ray_token()[0] == "third"
    (tmp_path / "file").write_text("second\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert ray_token()[0] == "second"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    assert ray_token()[0] == "first"


def test_a_token_file_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    with pytest.raises(ClusterError, match="cannot be read"):
        ray_token()
