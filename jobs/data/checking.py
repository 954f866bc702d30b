"""What happens to data on the submitting machine: read through once for mistakes, then stored under its digest."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from jobs.data.files import Row
from jobs.data.formats import conversations
from jobs.data.report import DataReport, count_rows
from jobs.data.sources import is_remote, local_files, local_rows, source_rows
from jobs.data.split import in_validation
from orchestrator.settings import load_settings
from orchestrator.spec.job import DataSpec
from orchestrator.spec.resolved import DataSource, RemoteData, ResolvedData, StoredFile
from orchestrator.store import Store


def check(
    spec: DataSpec, base_dir: Path | None = None, *, cache: Path | None = None, remote: bool = False
) -> DataReport:
    """Read every row as the job will, without a tokenizer; so that a mistake shows before anything is submitted.

    Args:
        base_dir: where relative paths start; default the current directory.
        cache: where packages of examples are kept; default that of the settings.
        remote: also read `s3://` and `hf:`; otherwise they are listed as unchecked, since only the job may reach them.

    Raises:
        DataError: the first thing that is wrong, with file and line.
        PackageError: the package of an example cannot be fetched.
    """
    reader = _Reader(spec, base_dir or Path(), cache or load_settings().cache, remote)
    train_format, train = reader.digests(as_list(spec.train), spec.limit)
    report = DataReport(format=train_format, train=count_rows(train_format, train))
    if isinstance(spec.validation, float):
        held_out = in_validation(train, spec.validation)
        report.train = count_rows(train_format, train[~held_out])
        report.validation = count_rows(train_format, train[held_out]) if held_out.any() else None
    else:
        format, digests = reader.digests(as_list(spec.validation))
        report.validation = count_rows(format, digests, train)
    if spec.test is not None:
        format, digests = reader.digests(as_list(spec.test), test=True)
        report.test = count_rows(format, digests, train)
    report.unchecked = reader.unchecked
    return report


class _Reader:
    def __init__(self, spec: DataSpec, base_dir: Path, cache: Path, remote: bool):
        self._spec, self._base_dir, self._cache, self._remote = spec, base_dir, cache, remote
        self.unchecked: list[str] = []

    def digests(self, references: list[str], limit: int | None = None, *, test: bool = False) -> tuple[str, np.ndarray]:
        """Format and uint64[rows] of one split."""
        digests, format = array("Q"), "unchecked"
        rows = chain.from_iterable(map(self._rows, references))
        for conversation, format in islice(conversations(rows, self._spec.format), limit):  # noqa: B007
            digests.append(conversation.number())
            if test:
                conversation.question_and_answer()
        return format, np.array(digests, np.uint64)

    def _rows(self, reference: str) -> Iterator[Row]:
        if is_remote(reference) and not self._remote and not reference.startswith("example:"):
            self.unchecked.append(reference)
            return iter(())
        return reference_rows(reference, self._base_dir, self._cache)


def reference_rows(reference: str, base_dir: Path, cache: Path) -> Iterator[Row]:
    """Rows behind a reference as a person writes it, before anything is stored."""
    if is_remote(reference):
        return source_rows(RemoteData(uri=reference), store=None, cache=cache)
    return chain.from_iterable(local_rows(path, name) for path, name in _named_files(reference, base_dir))


def resolve(spec: DataSpec, *, store: Store, base_dir: Path | None = None) -> ResolvedData:
    """Copy local files to the store and name them by their digest; what is remote stays where it is.

    Raises:
        DataError: there is no such file.
        StoreError: the store cannot be written.
    """
    base_dir = base_dir or Path()
    validation = spec.validation
    return ResolvedData(
        train=_sources(spec.train, store, base_dir),
        validation=validation if isinstance(validation, float) else _sources(validation, store, base_dir),
        test=_sources(spec.test, store, base_dir) if spec.test is not None else [],
    )


def _sources(references: str | list[str], store: Store, base_dir: Path) -> list[DataSource]:
    out: list[DataSource] = []
    for reference in as_list(references):
        if is_remote(reference):
            out.append(RemoteData(uri=reference))
            continue
        for path, name in _named_files(reference, base_dir):
            out.append(StoredFile(name=name, sha256=store.put_file(path), size=path.stat().st_size))
    return out


def _named_files(reference: str, base_dir: Path) -> list[tuple[Path, str]]:
    """Files behind a local reference, each with its name for messages: as written, or relative to `base_dir`."""
    files = local_files(reference, base_dir)
    if len(files) == 1 and files[0] == base_dir / reference:
        return [(files[0], reference)]
    inside = [path.relative_to(base_dir) if path.is_relative_to(base_dir) else path for path in files]
    return [(path, str(name)) for path, name in zip(files, inside, strict=True)]


def as_list(references: str | list[str]) -> list[str]:
    return [references] if isinstance(references, str) else references
