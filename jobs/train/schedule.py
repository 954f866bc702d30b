"""The learning rate of each step, as a function of the step alone, so that a resumed run cannot jump."""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.spec.job import TrainSpec


def learning_rates(train: TrainSpec, total_steps: int) -> Callable[[int], float]:
    """Step (from 0) → learning rate.

    The curves are transformers' own (a test compares them), written out because `transformers.optimization` takes two
    seconds to import, which the first step would wait for. They are read at the middle of a step, so that neither the
    first nor the last step is spent at a rate of zero. With `warmup_steps` a run that is shorter than its warmup ends on
    the way up.
    """
    warmup = round(train.warmup * total_steps) if train.warmup_steps is None else train.warmup_steps
    decay = (
        max(1, round(train.decay * total_steps)) if train.schedule == "warmup_stable_decay" else total_steps - warmup
    )
    flat = max(0, total_steps - warmup - decay)

    def factor(at: float) -> float:
        if at < warmup:
            return at / warmup
        falling = min(1.0, max(0.0, at - warmup - flat) / max(1, decay))
        match train.schedule:
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * falling))
            case "linear" | "warmup_stable_decay":
                return 1.0 - falling
            case "constant":
                return 1.0

    return lambda step: train.learning_rate * factor(step + 0.5)
