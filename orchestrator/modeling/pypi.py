"""Models and data that are published as PyPI wheels: fetched with pip, unpacked, read; no code of theirs is ever run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from orchestrator.errors import PackageError

_DOWNLOAD_SECONDS = 900


def pypi_package(requirement: str, cache: Path) -> Path:
    """The directory with the files of a wheel's import package (`…/evals` for `evals==3.0.1.post1`).

    An installed copy is used if it satisfies the requirement, then one unpacked earlier, else `pip download` fetches the
    wheel to `cache/pypi/<name>-<version>/`. Safe when several processes ask at once. Nothing is imported or installed.

    Raises:
        PackageError: not a requirement, or the wheel cannot be fetched or unpacked.
    """
    try:
        wanted = Requirement(requirement)
    except InvalidRequirement as error:
        raise PackageError(
            f"{requirement!r} is not a PyPI requirement.",
            hint="Write pypi:NAME or pypi:NAME==VERSION.",
            package=requirement,
        ) from error
    name = canonicalize_name(wanted.name)
    if installed := _installed(wanted):
        return installed
    root = cache / "pypi"
    if unpacked := _unpacked(wanted, root, name):
        return _import_package(unpacked)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        unpacked = _unpacked(wanted, root, name) or _fetch(wanted, root, name)
    return _import_package(unpacked)


def _installed(wanted: Requirement) -> Path | None:
    """The package's directory in this environment; None if it is absent, another version or not one plain directory."""
    try:
        found = metadata.distribution(wanted.name)
    except metadata.PackageNotFoundError:
        return None
    if not wanted.specifier.contains(found.version, prereleases=True):
        return None
    tops = {file.parts[0] for file in found.files or [] if _is_package_part(file.parts)}
    if len(tops) != 1:
        return None
    directory = Path(str(found.locate_file(tops.pop())))
    return directory if directory.is_dir() else None


def _is_package_part(parts: tuple[str, ...]) -> bool:
    return len(parts) > 1 and parts[0] not in ("..", "bin") and not parts[0].endswith((".dist-info", ".data"))


def _unpacked(wanted: Requirement, root: Path, name: str) -> Path | None:
    """The newest version under `root` that satisfies the requirement."""
    found = [(Version(path.name.rpartition("-")[2]), path) for path in root.glob(f"{name}-*") if path.is_dir()]
    fitting = [pair for pair in found if wanted.specifier.contains(pair[0], prereleases=True)]
    return max(fitting)[1] if fitting else None


def _fetch(wanted: Requirement, root: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=root) as temporary:
        wheel = _download(str(wanted), Path(temporary) / "wheel")
        version = parse_wheel_filename(wheel.name)[1]
        unpacked = Path(temporary) / "unpacked"
        _unzip(wheel, unpacked)
        target = root / f"{name}-{version}"
        unpacked.replace(target)
    return target


def _download(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise PackageError(
            f"pip took more than {_DOWNLOAD_SECONDS} s to fetch {requirement}.",
            hint="Check the connection to the package index and run the command again.",
            package=requirement,
        ) from error
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise PackageError(
            f"The package {requirement} cannot be fetched: {lines[-1] if lines else 'pip found no wheel'}",
            hint="Check its name and version and that pip reaches its index (`pip download` needs network the first "
            f"time), or install it beforehand: pip install --no-deps '{requirement}'.",
            package=requirement,
        )
    return wheels[0]


def _unzip(wheel: Path, directory: Path) -> None:
    """Unpack plain files only; `extractall` writes neither links nor modes, and escaping names are refused here."""
    root = directory.resolve()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                if not (root / entry).resolve().is_relative_to(root):
                    raise PackageError(f"{wheel.name} names {entry!r}, outside its directory.", package=wheel.name)
            archive.extractall(directory)
    except zipfile.BadZipFile as error:
        raise PackageError(
            f"{wheel.name} is damaged: {error}.", hint="Run the command again.", package=wheel.name
        ) from error
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise PackageError(
            f"{wheel.name} cannot be unpacked to {directory}: {error.strerror}.",
            hint="Free some disk space, or move ADAPTORY_HOME to a larger disk.",
            package=wheel.name,
        ) from error


def _import_package(unpacked: Path) -> Path:
    """The one import package of an unpacked wheel, or its root when it has several."""
    tops = [p for p in unpacked.iterdir() if p.is_dir() and not p.name.endswith((".dist-info", ".data"))]
    return tops[0] if len(tops) == 1 else unpacked
