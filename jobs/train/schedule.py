"""The learning rate of each step, as a function of the step alone, so that a resumed run cannot jump."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orchestrator.spec.job import TrainSpec


def learning_rates(train: TrainSpec, total_steps: int) -> Callable[[int], float]:
    """Step (from 0) → learning rate, by transformers' own schedules.

    They are read at the middle of a step, so that neither the first nor the last step is spent at a rate of zero.
    """
    from transformers import optimization as schedules

    warmup = round(train.warmup * total_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)  # LambdaLR wants one; it is never stepped
    match train.schedule:
        case "cosine":
            made = schedules.get_cosine_schedule_with_warmup(optimizer, warmup, total_steps)
        case "linear":
            made = schedules.get_linear_schedule_with_warmup(optimizer, warmup, total_steps)
        case "constant":
            made = schedules.get_constant_schedule_with_warmup(optimizer, warmup)
        case "warmup_stable_decay":
            decay = max(1, round(train.decay * total_steps))
            made = schedules.get_wsd_schedule(
                optimizer, warmup, decay, num_stable_steps=max(0, total_steps - warmup - decay), decay_type="linear"
            )
    factor = made.lr_lambdas[0]
    return lambda step: train.learning_rate * factor(step + 0.5)
