"""The KubeRay manifests, checked against its CRDs. 5 to 15 seconds: the CRDs are 3 MB of YAML."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import __version__

ROOT = Path(__file__).parents[3]
MANIFESTS = sorted((ROOT / "cluster" / "manifests").glob("*.yaml"))
VALIDATOR = ROOT.parent / "shared" / "kuberay" / "validate.py"


def _cluster(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text())
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def _pods(path: Path) -> list[dict[str, Any]]:
    spec = _cluster(path)
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def test_there_is_a_cluster_and_a_job() -> None:
    assert [path.name for path in MANIFESTS] == ["raycluster.yaml", "rayjob.yaml"]


@pytest.mark.skipif(not VALIDATOR.exists(), reason=f"no {VALIDATOR}: put KubeRay's CRDs there to check the manifests")
def test_kuberay_takes_them() -> None:
    command = [sys.executable, str(VALIDATOR), *map(str, MANIFESTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(MANIFESTS)} documents checked, 0 faults" in done.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_the_cluster_asks_for_a_token_and_runs_the_tested_ray(path: Path) -> None:
    spec = _cluster(path)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == version("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["enableInTreeAutoscaling"] is True
    assert {group["groupName"] for group in spec["workerGroupSpecs"]} == {"cpu", "gpu"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_every_container_is_confined_and_reaches_the_store(path: Path) -> None:
    for pod in _pods(path):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert {"secretRef": {"name": "adaptory-store"}} in container["envFrom"]
            assert container["image"].endswith(f":{__version__}")


def test_job_and_cluster_describe_the_same_cluster() -> None:
    assert _cluster(MANIFESTS[0]) == _cluster(MANIFESTS[1])


def test_no_secret_is_written_in_a_manifest() -> None:
    for pod in [pod for path in MANIFESTS for pod in _pods(path)]:
        for container in pod["containers"]:
            names = [entry["name"] for entry in container["env"] if "value" in entry]
            assert not [
                name for name in names if "KEY" in name or "TOKEN" in name or "SECRET" in name or "PASSWORD" in name
            ]


def test_the_image_has_the_submitters_python_and_a_user_of_its_own() -> None:
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    assert "ARG PYTHON=3.11" in lines
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
