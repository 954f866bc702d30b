"""What to serve, and with how much: the plan that `adaptory up` hands to `python -m serving`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.engine.choice import EngineChoice, OwnEngine


class Replicas(BaseModel):
    """How many replicas of an engine there may be. `min` = `max`: always so many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int = Field(default=1, ge=0)
    """0: none while nobody asks; the first request then waits for the start."""
    max: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"at least {self.min} and at most {self.max} replicas cannot be")
        return self


class ServedModel(BaseModel):
    """A base model to serve."""

    model_config = ConfigDict(frozen=True)

    name: str
    """As clients call it."""
    reference: str
    replicas: Replicas = Replicas()
    engine: EngineChoice = Field(default_factory=OwnEngine)


class Plan(BaseModel):
    """What to deploy; JSON, from who starts `serving`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = 8000
    models: tuple[ServedModel, ...]
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """`auto`: bfloat16 where a replica's hardware multiplies it, else float32."""
    max_length: int = 4096
    max_sequences: int = 32
    max_adapters: int = 64
    """In an engine at the same time."""
    adapter_bytes: int = 2 << 30
    """Of adapters in the memory of each replica."""
    threads: int | None = None
    """Of each engine; None: all cores."""
    gateways: int = Field(default=1, ge=1)
    """Gateway processes; several need PostgreSQL, which they share limits by."""
    idle_seconds: float = Field(default=300.0, ge=0)
    """After which the last replica goes, where there may be none."""
    trusted_keys: tuple[str, ...] = ()
    """Public keys (PEM) whose signatures of adapters count. They are here, since replicas may be on machines that have none
    of the keys' files."""
