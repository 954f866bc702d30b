"""One optimiser step as every loop takes it: where a run stands, and when it is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jobs.train.engines import Engine
from orchestrator.errors import TrainingDiverged

_LEARNT = 1e-3
"""Nats a token; below it rounding may leave no gradient."""
_EXPLODED = 100.0
"""Nats a token: eight times what guessing among Gemma's 262,144 tokens costs (12.5), which no step comes back from."""


@dataclass
class Progress:
    """Where the run is; handed to `Hooks` and kept with each checkpoint."""

    step: int
    """Optimiser steps done."""
    total_steps: int
    tokens: int = 0
    """Tokens of the rows seen, over all workers."""
    loss: float = math.nan
    grad_norm: float = math.nan
    learning_rate: float = 0.0
    validation_loss: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float = 0.0
    epoch: float = 0.0


def take_step(engine: Engine, progress: Progress, learning_rate: float) -> None:
    """Apply the accumulated gradient of the step whose loss is in `progress`, which is brought up to date.

    Raises:
        TrainingDiverged: the loss or the gradient is not finite, or the loss has exploded: the weights are those of the step
            before; or there is loss and no gradient: they are lost already.
    """
    progress.learning_rate = learning_rate
    sane = progress.loss <= _EXPLODED  # False for NaN as well
    progress.grad_norm = engine.step(learning_rate) if sane else math.nan
    if not math.isfinite(progress.grad_norm) or _stuck(progress):
        what = f"loss {progress.loss:.4g}"
        raise diverged(progress, f"gradient norm {progress.grad_norm} with {what}" if sane else what, progress.step + 1)
    progress.step += 1


def _stuck(progress: Progress) -> bool:
    """Whether there is something to learn and no gradient to learn it by: weights so large that activations overflow leave
    uniform logits, from which no step leads away. (A new adapter has a gradient: that of B, while B is zero.)"""
    return progress.loss > _LEARNT and progress.grad_norm <= 0.0


def diverged(progress: Progress, what: str, step: int) -> TrainingDiverged:
    """
    Args:
        what: of this step shows it.
    """
    return TrainingDiverged(
        f"Training diverged at step {step}: {what} at learning rate {progress.learning_rate:.3g}.",
        hint="Checkpoints of earlier steps are kept. Lower train.learning_rate (a third is a good next try), "
        "or set train.warmup and train.max_grad_norm.",
        step=step,
        learning_rate=progress.learning_rate,
    )
