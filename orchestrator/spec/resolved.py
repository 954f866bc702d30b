"""The resolved spec: the JSON a job reads. Everything a person left out is filled in, and data is named by its bytes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator

from orchestrator.spec.job import JobSpec


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(_Frozen):
    """A local file, copied to the store under its digest when the run was submitted."""

    type: Literal["file"] = "file"
    name: str
    """As the person wrote it, for messages."""
    sha256: str
    size: int
    """Bytes."""


class RemoteData(_Frozen):
    """Data that the job reads where it is: `s3://…`, `hf:…`, `example:…`."""

    type: Literal["uri"] = "uri"
    uri: str


DataSource = Annotated[StoredFile | RemoteData, Discriminator("type")]


class ResolvedData(_Frozen):
    train: list[DataSource]
    validation: list[DataSource] | float
    test: list[DataSource] = []


class ResolvedSpec(_Frozen):
    """`runs/<run>/spec.json`."""

    run: str
    """Run id."""
    spec: JobSpec
    """The person's spec with every default filled in."""
    data: ResolvedData
    base_model: str
    """Where the base model is loaded from: `spec.base_model`, or `store:bases/<digest>` when its bytes were uploaded."""
    store_url: str
    git_commit: str | None = None
    versions: dict[str, str] = {}
    """Python, Ray and project versions of the machine that submitted."""
    created_at: float
    """Seconds since the epoch."""
