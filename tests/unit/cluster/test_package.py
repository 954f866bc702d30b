"""The code that is shipped. Under a second."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

from cluster.package import PACKAGES, code_package


def _tree(root: Path, text: str = "x = 1\n") -> Path:
    for package in PACKAGES:
        (root / package / "tests").mkdir(parents=True)
        (root / package / "__pycache__").mkdir()
        (root / package / "__init__.py").write_text(text)
        (root / package / "tests" / "test_x.py").write_text("")
        (root / package / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"\0")
    (root / "tests").mkdir()
    return root


def test_equal_code_has_one_name_and_equal_bytes_wherever_and_whenever_it_is(tmp_path: Path) -> None:
    one, two = _tree(tmp_path / "one"), _tree(tmp_path / "two")
    for path in two.rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    assert code_package(one) == code_package(two)


def test_other_code_has_another_name(tmp_path: Path) -> None:
    assert code_package(_tree(tmp_path / "one"))[0] != code_package(_tree(tmp_path / "two", "x = 2\n"))[0]


def test_only_the_packages_are_in_it_without_tests_and_caches(tmp_path: Path) -> None:
    names = zipfile.ZipFile(io.BytesIO(code_package(_tree(tmp_path / "one"))[1])).namelist()
    assert sorted(names) == sorted(f"{package}/__init__.py" for package in PACKAGES)


def test_this_project_is_shipped_with_its_data_files() -> None:
    name, data = code_package()
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    assert name.startswith("_ray_pkg_")
    assert name.endswith(".zip")
    assert {"orchestrator/__init__.py", "cluster/probe_job.py", "cluster/manifests/raycluster.yaml"} <= set(names)
    assert not [n for n in names if n.split("/")[0] not in PACKAGES or n.endswith(".pyc")]
