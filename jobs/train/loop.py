"""The training loop: one screen, over an engine, on flat packed tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jobs.train.batches import Batches
from jobs.train.engines import Engine
from jobs.train.exhausted import memory_ran_out, memory_wanted
from orchestrator.errors import OutOfMemory, TrainingDiverged
from orchestrator.modeling.attention import Documents
from orchestrator.modeling.lora import Segment
from orchestrator.modeling.network import Network

SLOT = "tuned"
"""The adapter slot that a single fine-tune trains."""

_LEARNT = 1e-3
"""Nats a token; below it rounding may leave no gradient."""
_EXPLODED = 100.0
"""Nats a token: eight times what guessing among Gemma's 262,144 tokens costs (12.5), which no step comes back from."""


class Rows(Protocol):
    """Tokenised rows: `jobs.data.TokenizedRows`."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Any:
        """`.ids` int32 [tokens], `.loss_mask` bool [tokens]."""

    @property
    def labelled(self) -> np.ndarray:
        """Tokens with a loss, by row."""


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


@dataclass
class Hooks:
    """What happens around the steps; all optional."""

    on_step: Callable[[Progress], None] = lambda progress: None
    validate: Callable[[Progress], None] | None = None
    checkpoint: Callable[[Progress], None] | None = None
    asked_to_stop: Callable[[], str | None] = lambda: None
    """`pause` or `cancel` ends the loop after the step in hand; every rank gets the same answer."""
    validate_every: int = 0
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
        torch.manual_seed(_mix(seed, step, rank))  # dropout is a function of the step, so that a resumed run repeats it
        labelled = int(rows.labelled[batches.rows(step)].sum())
        total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        for micro in batches.micro_batches(step, rank):
            batch = pack(rows, micro, labelled, device, share=share)
            with memory_explained(batch):
                loss, _ = forward(model, batch, slot)
                engine.backward(loss * workers)  # gradients are averaged over workers; the step's loss is a sum
            total += torch.tensor([loss.item(), batch.real_tokens], dtype=torch.float64)
        total = hooks.all_reduce(total)
        progress.loss, progress.learning_rate = total[0].item(), learning_rate(step)
        sane = progress.loss <= _EXPLODED  # False for NaN as well
        progress.grad_norm = engine.step(progress.learning_rate) if sane else math.nan
        if not math.isfinite(progress.grad_norm) or _stuck(progress):
            raise _diverged(progress, step)
        progress.step, progress.epoch = step + 1, batches.epoch(step + 1)
        clock.tick(progress, int(total[1]))
        stop = hooks.asked_to_stop()
        last = progress.step == batches.total_steps or stop is not None
        if hooks.validate and (last or _due(progress.step, hooks.validate_every)) and stop is None:
            hooks.validate(progress)
            model.train()
        hooks.on_step(progress)
        if hooks.checkpoint and (last or _due(progress.step, hooks.checkpoint_every)) and stop != "cancel":
            hooks.checkpoint(progress)
        clock.resume()
        if stop is not None:
            return stop
    return None


@dataclass
class PackedBatch:
    """A micro-batch: whole documents side by side."""

    ids: Tensor
    """[tokens]"""
    documents: Documents
    labels: Tensor
    """[labelled], the token that follows each position of `at`."""
    at: Tensor
    """[labelled], positions in `ids`."""
    token_weights: Tensor
    """[labelled], fp32: 1 / labelled tokens of the whole step."""
    real_tokens: int


def pack(
    rows: Rows, chosen: Sequence[int], labelled: int, device: torch.device | str = "cpu", *, share: bool = False
) -> PackedBatch:
    """Put rows side by side; an empty choice becomes one row without weight, since collectives must stay in step.

    Args:
        labelled: tokens with a loss in the whole step.
        share: let rows that begin alike compute their common beginning once; it changes no result.
    """
    picked = [rows[row] for row in chosen] or [rows[0]]
    shared = common_beginning(picked) if share and len(picked) > 1 else 0
    own = [row.ids[shared:] for row in picked]
    ids = torch.from_numpy(np.concatenate([picked[0].ids[:shared], *own]).astype(np.int64))
    # the label of a position is the next token of its own document, so the first token of a document is never one
    target = [np.append(row.loss_mask[shared + 1 :], False) for row in picked]
    at = torch.from_numpy(np.flatnonzero(np.concatenate([np.zeros(shared, bool), *target])))
    weight = 1.0 / max(1, labelled) if chosen else 0.0
    return PackedBatch(
        ids=ids.to(device),
        documents=Documents([len(row.ids) for row in picked], device, shared=shared),
        labels=ids[at + 1].to(device),
        at=at.to(device),
        token_weights=torch.full((len(at),), weight, device=device),
        real_tokens=sum(len(row.ids) for row in picked) if chosen else 0,
    )


def common_beginning(picked: Sequence[Any]) -> int:
    """Tokens with which all rows begin, as far as none of them has a loss there or on the token after."""
    first = picked[0].ids
    most = min(len(row.ids) for row in picked) - 1
    for row in picked[1:]:
        differs = np.flatnonzero(first[:most] != row.ids[:most])
        most = int(differs[0]) if len(differs) else most
    learned = [np.flatnonzero(row.loss_mask[1:]) for row in picked]  # positions that predict a target
    return min([most, *(int(places[0]) for places in learned if len(places))])


def forward(model: Network, batch: PackedBatch, slot: str | None) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the step's loss, and each labelled token's own loss."""
    segments = [Segment(slot, 0, len(batch.ids))]
    return model.loss(batch.ids, batch.documents, batch.labels, batch.at, batch.token_weights, segments)


@contextmanager
def memory_explained(batch: PackedBatch) -> Iterator[None]:
    """Say what to lower when a micro-batch does not fit."""
    try:
        yield
    except Exception as error:
        if memory_ran_out(error):
            raise _out_of_memory(batch, error) from error
        raise


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


def _mix(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _stuck(progress: Progress) -> bool:
    """Whether there is something to learn and no gradient to learn it by: weights so large that activations overflow leave
    uniform logits, from which no step leads away. (A new adapter has a gradient: that of B, while B is zero.)"""
    return progress.loss > _LEARNT and progress.grad_norm <= 0.0


def _diverged(progress: Progress, step: int) -> TrainingDiverged:
    what = f"loss {progress.loss:.4g}"
    if progress.loss <= _EXPLODED:
        what = f"gradient norm {progress.grad_norm} with {what}"
    return TrainingDiverged(
        f"Training diverged at step {step + 1}: {what} at learning rate {progress.learning_rate:.3g}.",
        hint="Checkpoints of earlier steps are kept. Lower train.learning_rate (a third is a good next try), "
        "or set train.warmup and train.max_grad_norm.",
        step=step + 1,
        learning_rate=progress.learning_rate,
    )


def _out_of_memory(batch: PackedBatch, error: Exception) -> OutOfMemory:
    tokens, longest = len(batch.ids), max(batch.documents.lengths)
    return OutOfMemory(
        f"Out of memory in a micro-batch of {tokens} tokens (longest row {longest}){memory_wanted(error)}.",
        hint=f"Set train.micro_batch_tokens to {max(8, tokens // 2)}"
        + (f", train.max_length to {max(8, longest // 2)}" if longest * 2 > tokens else "")
        + ", or train.gradient_checkpointing: true.",
        tokens=tokens,
        longest=longest,
    )
