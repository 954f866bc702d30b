"""The frame of the project: borders, what is shipped, pins, and that the documentation tells the truth. About 10 seconds."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orchestrator

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cluster", "jobs", "orchestrator", "serving")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]

IMPORT_EVERYTHING = """
import pkgutil, sys
import orchestrator
for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator."):
    if not (module.name + ".").startswith("orchestrator.modeling.") and not module.name.endswith("migrations.env"):
        __import__(module.name)
print(*sorted({"torch", "ray", "transformers", "deepspeed", "datasets", "matplotlib"} & sys.modules.keys()))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# --- borders --------------------------------------------------------------------------------------------------------


def test_no_control_plane_module_pulls_in_torch_or_ray():
    done = run(sys.executable, "-c", IMPORT_EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("library", ["deepspeed", "bitsandbytes", "vllm", "xgrammar"])
def test_at_most_one_module_imports(library: str):
    importers = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if library in imported(path)
    ]
    assert len(importers) <= 1, importers


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


# --- what is shipped ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the built wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory))
    assert done.returncode == 0, done.stderr
    return set(zipfile.ZipFile(next(directory.glob("*.whl"))).namelist())


def test_wheel_holds_the_four_packages_and_nothing_else(wheel: set[str]):
    top = {name.split("/")[0] for name in wheel}
    assert top - {next(name for name in top if name.endswith(".dist-info"))} == set(PACKAGES)
    folders = {str(Path(name).parent) for name in wheel if name.endswith(".py")}
    without = {folder for folder in folders if f"{folder}/__init__.py" not in wheel}
    assert {folder for folder in without if "migrations" not in folder} == set()  # Alembic loads those by path


def test_wheel_carries_data_files_and_licence(wheel: set[str]):
    tracked = run("git", "ls-files", *PACKAGES).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: the list of shipped files comes from `git ls-files`")
    present = {name for name in tracked if (ROOT / name).exists()}
    assert any(name.endswith(".yaml") for name in present)
    assert present - wheel == set()
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_changelog_knows_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or orchestrator.__version__ in headings


# --- pins -----------------------------------------------------------------------------------------------------------


def test_every_dependency_is_pinned_to_a_version_it_allows():
    pins = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in CONSTRAINTS}
    wanted = [
        *PROJECT["dependencies"],
        *(item for group in PROJECT["optional-dependencies"].values() for item in group),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_constraints_name_exact_public_versions_and_no_index():
    assert "://" not in (ROOT / "constraints.txt").read_text()
    for pin in CONSTRAINTS:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert "+" not in specifier.version, pin  # a local build exists on one machine only


# --- the documentation tells the truth ------------------------------------------------------------------------------


def test_readme_tree_names_what_exists():
    tree = re.search(r"^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert tree, "the README has no annotated tree"
    parents: list[str] = []
    for line in tree[1].splitlines():
        if not line.strip():
            continue
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name.rstrip("/")]
        assert (ROOT / Path(*parents)).exists(), f"the README's tree names {'/'.join(parents)}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "gpu").glob("test_*.py")), ids=lambda path: path.stem)
def test_what_runs_on_a_gpu_only_is_found_all_the_same(path: Path):
    """It imports tests of other folders by name: one that is renamed there would be missed by nobody here."""
    module = importlib.import_module(f"tests.gpu.{path.stem}")
    assert [name for name in dir(module) if name.startswith("test_")]


def test_ci_runs_what_a_person_runs():
    script = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert script[0] == "set -euo pipefail"
    assert script[-1] == "make test"
    done = run("make", "--no-print-directory", "--dry-run", "test")
    assert done.returncode == 0, done.stderr
    tested = [line.split("-m pytest ")[1] for line in done.stdout.splitlines() if "-m pytest " in line]
    folders = [part for line in tested for part in line.split() if part.startswith("tests/")]
    assert folders == ["tests/unit", "tests/integration", "tests/e2e"]


def test_what_is_compiled_once_is_kept(monkeypatch: pytest.MonkeyPatch):
    """Many a container says that it must not be, and the packages are installed without."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    done = run("make", "--no-print-directory", "--eval", 'shown: ; @echo "[$${PYTHONDONTWRITEBYTECODE-kept}]"', "shown")
    assert (done.returncode, done.stdout) == (0, "[kept]\n"), done.stderr
