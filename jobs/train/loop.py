"""The training loop: one screen, over an engine, on flat packed tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.train.batches import Batches
from jobs.train.engines import Engine
from jobs.train.packing import Rows, dropout_seed, forward, memory_explained, pack
from jobs.train.steps import Progress, take_step
from orchestrator.modeling.network import Network

SLOT = "tuned"
"""The adapter slot that a single fine-tune trains."""


@dataclass
class Hooks:
    """What happens around the steps; all optional."""

    on_step: Callable[[Progress], None] = lambda progress: None
    validate: Callable[[Progress], None] | None = None
    checkpoint: Callable[[Progress], None] | None = None
    asked_to_stop: Callable[[], str | None] = lambda: None
    """`pause` or `cancel` ends the loop after the step in hand; every rank gets the same answer."""
    validate_every: int = 0
    validate_after: Callable[[int], bool] = lambda step: False
    """After which numbers of steps besides."""
    checkpoint_every: int = 0
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Sum over the workers."""


def train(
    model: Network,
    engine: Engine,
    rows: Rows,
    batches: Batches,
    learning_rate: Callable[[int], float],
    *,
    seed: int,
    progress: Progress,
    hooks: Hooks,
    rank: int = 0,
    workers: int = 1,
    slot: str | None = SLOT,
    device: torch.device | str = "cpu",
    share: bool = True,
) -> str | None:
    """Take the remaining optimiser steps.

    Args:
        share: let rows of a micro-batch that begin alike compute their beginning once; to be left out with dropout, which
            would otherwise be the same for all of them.
        progress: `step` says where to begin; updated in place.
        slot: the adapter to train; None for full tuning.

    Returns:
        None when all steps are done, else what `asked_to_stop` said.

    Raises:
        TrainingDiverged: the loss or the gradient is not finite, or the loss has exploded: the weights are those of the step
            before; or there is loss and no gradient: they are lost already.
        OutOfMemory: with the numbers and what to lower.
    """
    clock = _Clock(progress)
    model.train()
    for step in range(progress.step, batches.total_steps):
        torch.manual_seed(dropout_seed(seed, step, rank))  # for a plain network's
        labelled = int(rows.labelled[batches.rows(step)].sum())
        total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        for number, micro in enumerate(batches.micro_batches(step, rank)):
            batch = pack(rows, micro, labelled, device, share=share)
            with memory_explained(batch):
                loss, _ = forward(model, batch, slot, dropout_seed(seed, step, rank, number))
                engine.backward(loss * workers)  # gradients are averaged over workers; the step's loss is a sum
            total += torch.tensor([loss.item(), batch.real_tokens], dtype=torch.float64)
        total = hooks.all_reduce(total)
        progress.loss = total[0].item()
        take_step(engine, progress, learning_rate(step))
        progress.epoch = batches.epoch(step + 1)
        clock.tick(progress, int(total[1]))
        stop = hooks.asked_to_stop()
        last = progress.step == batches.total_steps or stop is not None
        validate = last or _due(progress.step, hooks.validate_every) or hooks.validate_after(progress.step)
        if hooks.validate and validate and stop is None:
            hooks.validate(progress)
            model.train()
        hooks.on_step(progress)
        if hooks.checkpoint and (last or _due(progress.step, hooks.checkpoint_every)) and stop != "cancel":
            hooks.checkpoint(progress)
        clock.resume()
        if stop is not None:
            return stop
    return None


@torch.no_grad()
def mean_loss(
    model: Network,
    rows: Rows,
    batches: Batches,
    *,
    rank: int = 0,
    slot: str | None = SLOT,
    device: torch.device | str = "cpu",
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """Mean loss of the labelled tokens of all rows, over all workers."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(batches.total_steps):
        for micro in batches.micro_batches(step, rank):
            batch = pack(rows, micro, 1, device, share=True)
            with memory_explained(batch):
                _, losses = forward(model, batch, slot)
            if micro:
                total += torch.tensor([losses.double().sum().item(), len(losses)], dtype=torch.float64)
    total = all_reduce(total)
    return (total[0] / total[1].clamp(min=1)).item()


class _Clock:
    """Tokens per second over the last steps, and what that leaves; time spent validating or saving is not counted."""

    def __init__(self, progress: Progress):
        self._recent: list[tuple[float, int]] = []
        self._total_steps = progress.total_steps
        self.resume()

    def resume(self) -> None:
        self._start = time.perf_counter()

    def tick(self, progress: Progress, tokens: int) -> None:
        self._recent = [*self._recent[-19:], (time.perf_counter() - self._start, tokens)]
        seconds = sum(s for s, _ in self._recent)
        progress.tokens += tokens
        progress.tokens_per_second = sum(t for _, t in self._recent) / max(seconds, 1e-9)
        progress.seconds_left = (self._total_steps - progress.step) * seconds / len(self._recent)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
