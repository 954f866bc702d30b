"""What the nodes' answers mean, and when they are asked. About two seconds, as it imports Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster import probe as probing
from cluster.probe import NodeAnswer, ProbeAnswer, check, local_versions, preflight, resources_of
from cluster.resources import ClusterResources, NodeResources
from orchestrator.errors import ClusterError, InsufficientResources, StoreError
from orchestrator.settings import Settings
from orchestrator.spec.job import JobSpec
from orchestrator.store import Store

if TYPE_CHECKING:
    from conftest import FakeRay


def answer(**changes: object) -> NodeAnswer:
    return NodeAnswer.model_validate({"node": "10.0.0.7", **local_versions(), **changes})


def whole(*nodes: NodeAnswer, silent: dict[str, str] | None = None) -> ProbeAnswer:
    resources = ClusterResources(nodes=[NodeResources(name="10.0.0.7", cpus=4)])
    return ProbeAnswer(nodes=list(nodes), silent=silent or {}, resources=resources)


def job(**resources: object) -> JobSpec:
    return JobSpec.model_validate(
        {"name": "x", "base_model": "m", "data": {"train": "a.jsonl"}, "resources": {"workers": 1, **resources}}
    )


def test_equal_versions_and_a_store_in_reach_are_fine() -> None:
    check(whole(answer(), answer()), "s3://b/p")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"python": "3.9.1"}, "Node 10.0.0.7 runs Python 3.9, this machine"),
        ({"ray": "2.9.0"}, "Node 10.0.0.7 runs Ray 2.9.0, this machine"),
        ({"project": "0.0.1"}, "Node 10.0.0.7 runs Adaptory 0.0.1, this machine"),
    ],
)
def test_each_version_has_an_error_of_its_own(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ClusterError, match=says):
        check(whole(answer(), answer(**changes)), "s3://b/p")


def test_what_is_known_of_a_cluster_without_a_job(fake_ray: FakeRay, home: Path) -> None:
    """A local one is asked; of another one its last probe is believed, since only that knows the autoscaler."""
    settings = Settings(store_url="s3://b/p")
    client = fake_ray.client(local=True)
    assert probing.known_resources(client, settings) == resources_of(client)
    client.local = False
    assert probing.known_resources(client, settings) is None
    probing._remember(client, settings, whole(answer()))
    assert probing.known_resources(client, settings) == whole().resources


def test_another_patch_of_python_is_fine() -> None:
    check(whole(answer(python=local_versions()["python"].rsplit(".", 1)[0] + ".99")), "s3://b/p")


def test_a_silent_node_is_named_with_its_reason() -> None:
    with pytest.raises(ClusterError, match=r"Node 10\.0\.0\.8 did not answer the probe: no module named orchestrator"):
        check(whole(answer(), silent={"10.0.0.8": "no module named orchestrator"}), "s3://b/p")


def test_a_directory_of_this_machine_is_out_of_reach_for_a_node_that_does_not_see_what_was_written(
    tmp_path: Path,
) -> None:
    """The node's directory is another one of the same kind: it could be written, and must not be believed."""
    from cluster.probe_job import answer_here

    text = answer_here("10.0.0.7", str(tmp_path / "store"), "probes/ours")
    with pytest.raises(
        StoreError, match=r"Node 10\.0\.0\.7 cannot reach the store .*, a directory of this machine"
    ) as caught:
        check(whole(NodeAnswer.model_validate_json(text)), str(tmp_path / "store"))
    assert "s3://BUCKET/PREFIX" in (caught.value.hint or "")
    assert not (tmp_path / "store").exists()


def test_a_shared_directory_is_fine(tmp_path: Path) -> None:
    from cluster.probe_job import answer_here

    Store(str(tmp_path)).write("probes/ours", b"x")
    check(whole(NodeAnswer.model_validate_json(answer_here("n", str(tmp_path), "probes/ours"))), str(tmp_path))


def test_wrong_credentials_are_the_stores_error_with_the_node(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.probe_job import answer_here

    Store(s3).write("probes/ours", b"x")
    check(whole(NodeAnswer.model_validate_json(answer_here("n", s3, "probes/ours"))), s3)
    gone = s3.replace("adaptory-", "no-such-bucket-")
    with pytest.raises(StoreError, match=r"Node 10\.0\.0\.7 cannot use the store"):
        check(whole(NodeAnswer.model_validate_json(answer_here("10.0.0.7", gone, "probes/ours"))), gone)


# --- preflight ------------------------------------------------------------------------------------------------------


def test_a_local_ray_is_only_asked_what_it_has(fake_ray: FakeRay, home: Path) -> None:
    preflight(fake_ray.client(), Settings(), job(workers=2))
    assert not fake_ray.jobs
    with pytest.raises(InsufficientResources, match="it has 1 node with 2 CPUs"):
        preflight(fake_ray.client(), Settings(), job(workers=3))


def test_resources_over_http(fake_ray: FakeRay) -> None:
    assert resources_of(fake_ray.client()).cpus == 2


def test_a_good_answer_is_believed_for_a_while_and_a_bad_one_never(
    fake_ray: FakeRay, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answers = [], [whole(answer(ray="1.0")), whole(answer()), whole(answer()), whole(answer())]
    monkeypatch.setattr(probing, "probe", lambda client, url, env: asked.append(url) or answers.pop(0))
    settings, client = Settings(store_url="s3://b/p"), fake_ray.client(local=False)
    with pytest.raises(ClusterError, match=r"runs Ray 1\.0"):
        preflight(client, settings, job())
    preflight(client, settings, job())
    preflight(client, settings, job())
    assert len(asked) == 2
    with pytest.raises(InsufficientResources):  # what the answer said about resources is remembered too
        preflight(client, settings, job(workers=9))
    preflight(client, Settings(store_url="s3://other/p"), job())
    assert len(asked) == 3
    for path in (home / "cache" / "probes").iterdir():
        os.utime(path, (1, 1))
    preflight(client, settings, job())
    assert len(asked) == 4


def test_a_local_ray_with_a_remote_store_is_asked_too(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = whole(answer(store_error=StoreError("no key").to_dict()))
    monkeypatch.setattr(probing, "probe", lambda client, url, env: refused)
    with pytest.raises(StoreError, match="no key"):
        preflight(fake_ray.client(), Settings(store_url="s3://b/p"), job())


def test_a_probe_that_fails_says_what_it_printed(
    fake_ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fake_ray._submit

    def failing(request: dict[str, object]) -> tuple[int, object]:
        result = plain(request)
        fake_ray.jobs[str(request["submission_id"])] |= {
            "status": "FAILED",
            "logs": "ModuleNotFoundError: no pydantic\n",
        }
        return result

    monkeypatch.setattr(fake_ray, "_submit", failing)
    with pytest.raises(ClusterError, match="ModuleNotFoundError: no pydantic"):
        probing.probe(fake_ray.client(), str(tmp_path))
    assert Store(str(tmp_path)).list("probes") == []


def test_the_probes_answer_is_found_among_other_lines(
    fake_ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = fake_ray._submit, []

    def answering(request: dict[str, object]) -> tuple[int, object]:
        result = plain(request)
        seen.append(request["entrypoint"])
        log = f"INFO ray\n{probing.MARK}{whole(answer()).model_dump_json()}\n"
        fake_ray.jobs[str(request["submission_id"])] |= {"status": "SUCCEEDED", "logs": log}
        return result

    monkeypatch.setattr(fake_ray, "_submit", answering)
    assert probing.probe(fake_ray.client(), str(tmp_path)) == whole(answer())
    assert str(tmp_path) in str(seen[0])
    assert json.dumps(fake_ray.requests).count("DELETE") == 1
