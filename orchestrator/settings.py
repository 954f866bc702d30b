"""Where state lives: `ADAPTORY_*` environment variables → `Settings`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from orchestrator.errors import SettingsError


class Settings(BaseSettings):
    """Read once at a composition root and passed on; nothing else reads the environment."""

    model_config = SettingsConfigDict(env_prefix="ADAPTORY_", extra="ignore", frozen=True)

    home: Path = Field(default=Path("~/.adaptory"))
    """Directory of `state.db`, `store/`, `keys/` and `cache/`."""

    database_url: str | None = None
    """SQLAlchemy URL; default SQLite in `home`."""

    store_url: str | None = None
    """Artifact store: a directory or `s3://bucket/prefix`; default `home`/store. S3 endpoint and credentials come from AWS_*."""

    ray_address: str | None = None
    """Ray Jobs API address (`http://host:8265`); default: the local Ray, started on demand."""

    tenant: str = "default"
    """Owner of what is created when nothing else says so."""

    signing_key: Path | None = None
    """PEM file of the private key (ECDSA on P-256, P-384 or P-521) that signs adapters; default: one of this machine's own,
    made on first use in `home`/keys."""

    trusted_keys: Annotated[tuple[Path, ...], NoDecode] = ()
    """PEM files of public keys whose signatures count beside our own, with commas between them: of another machine with the
    same store, or of a key that was replaced."""

    max_rank: int = Field(default=256, ge=1)
    """Largest LoRA rank that an import admits."""

    vllm_python: Path | None = None
    """Interpreter of the environment with vLLM, on the nodes; for `up --engine vllm`."""

    @field_validator("trusted_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("home", "signing_key", "vllm_python")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value else None

    @field_validator("trusted_keys")
    @classmethod
    def _expand_all(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(path.expanduser().absolute() for path in value)

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'state.db'}"

    @property
    def store(self) -> str:
        return self.store_url or str(self.home / "store")

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def keys(self) -> Path:
        return self.home / "keys"

    @property
    def metrics_key_file(self) -> Path:
        return self.keys / "metrics_key"

    @property
    def metrics_key(self) -> str | None:
        """Who shows it to a gateway reads the figures of all tenants; None where `adaptory up` has put none on this machine."""
        try:
            return self.metrics_key_file.read_text().strip() or None
        except OSError:
            return None

    def check_gateways(self, count: int) -> None:
        """
        Raises:
            SettingsError: so many gateway processes cannot share this database.
        """
        if count > 1 and self.database.startswith("sqlite"):
            raise SettingsError(
                f"{count} gateways cannot share SQLite: each would count its tenants' requests for itself.",
                hint="Point ADAPTORY_DATABASE_URL to a PostgreSQL, or serve with one gateway.",
            )

    @cached_property
    def remote(self) -> bool:
        """Whether jobs run on a cluster that somebody else started."""
        return self.ray_address is not None


def load_settings() -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: a variable has a value that cannot be used.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "ADAPTORY_" + "_".join(str(part) for part in first["loc"]).upper()
        raise SettingsError(
            f"{name}={first['input']!r}: {first['msg']}.", hint="Change or unset the variable."
        ) from error
