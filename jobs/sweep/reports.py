"""What a packed group says of its trials. Imports no torch: who hears it need not have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import TrainingDiverged

TrialState = Literal["running", "finished", "diverged"]


@dataclass(frozen=True)
class TrialReport:
    """Where a trial stands after a step."""

    trial: str
    state: TrialState
    step: int
    """Optimiser steps done."""
    total_steps: int
    epoch: float
    loss: float
    """Of the step, in nats a labelled token."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens of the rows seen, over all workers."""
    validation_loss: float | None = None
    """At the end of each epoch, and at the end."""
    error: TrainingDiverged | None = None


@dataclass
class Compute:
    """What training took: forward and backward passes over these tokens."""

    steps: int = 0
    tokens: int = 0

    def add(self, tokens: int, times: int = 1) -> None:
        """A step, or the same one for several trials."""
        self.add_all(times, times * tokens)

    def add_all(self, steps: int, tokens: int) -> None:
        self.steps += steps
        self.tokens += tokens
