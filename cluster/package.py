"""The project's code as one zip that Ray unpacks on every node: the same for a local and a remote cluster."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGES = ("orchestrator", "jobs", "cluster", "serving")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LEFT_OUT = {"__pycache__", "tests", "node_modules"}


@lru_cache(maxsize=1)
def code_package(root: Path | None = None) -> tuple[str, bytes]:
    """The four packages as a zip, and its name by content (`_ray_pkg_<hash>.zip`).

    The bytes depend on file names and contents alone, so equal code has one name on every machine and is uploaded once.

    Args:
        root: the directory that holds the packages; default: where this code runs from.
    """
    root = root or Path(__file__).parents[1]
    buffer = io.BytesIO()
    digest = hashlib.sha256()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _files(root):
            name, data = path.relative_to(root).as_posix(), path.read_bytes()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, compress_type=zipfile.ZIP_DEFLATED)
    return f"_ray_pkg_{digest.hexdigest()[:32]}.zip", buffer.getvalue()


def _files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            inside = path.relative_to(root).parts
            if path.is_file() and not _LEFT_OUT.intersection(inside) and path.suffix not in (".pyc", ".pyo"):
                yield path
