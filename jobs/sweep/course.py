"""What a trial computes at each of its steps, so that two can be found to compute the same."""

from __future__ import annotations

from typing import Any

from jobs.sweep import placement
from jobs.train.artifact import lora_shape
from jobs.train.schedule import learning_rates
from jobs.train.setup import planned_batches
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.plain import PlainDecoder
from orchestrator.spec.job import JobSpec, LoraTuning


class Course:
    """One trial's way, from its first step to its last.

    Args:
        spec: of the trial as a run of its own; `why_alone` says nothing against it.
        lengths: tokens of each training row.
        micro_batch_tokens: what `auto` stands for.
    """

    def __init__(self, trial: str, spec: JobSpec, lengths: Any, micro_batch_tokens: int, workers: int):
        train = spec.train
        assert isinstance(spec.tuning, LoraTuning)
        self.trial, self.spec, self.tuning = trial, spec, spec.tuning
        tokens = micro_batch_tokens if train.micro_batch_tokens == "auto" else train.micro_batch_tokens
        self.batches = planned_batches(train, lengths, tokens, workers=workers)
        self.total_steps = self.batches.total_steps
        self.shape, self.seed = lora_shape(spec.tuning), train.seed
        self.learning_rate = learning_rates(train, self.total_steps)
        optimizer = train.betas, train.eps, train.weight_decay, train.max_grad_norm
        self._tokens = tokens
        self._throughout = self.shape, self.seed, tokens, *optimizer

    def at(self, step: int) -> tuple[Any, ...]:
        """All that decides what a step does to the weights: trials for which it is equal, so far, have the same weights."""
        return *self._throughout, self.learning_rate(step), *self.batches.rows(step)

    @property
    def beginning(self) -> tuple[Any, ...]:
        """All that decides its first gradient: what it is trained by comes after that."""
        return self.shape, self.seed, self._tokens, *self.batches.rows(0)

    def reports(self, step: int) -> bool:
        """Whether validation is due after `step` steps: at the end of each epoch, and at the end."""
        return step == self.total_steps or self.batches.ends_epoch(step)


def why_unshared(network: Decoder | PlainDecoder) -> str | None:
    """Why no trials can share this network; None: some can."""
    plain = isinstance(network, PlainDecoder)
    return "its base model runs on the plain path, which takes one row at a time" if plain else None


def why_alone(spec: JobSpec, network: Decoder | PlainDecoder) -> str | None:
    """Why a trial cannot share this network with others; None: it can."""
    if reason := placement.why_alone(spec) or why_unshared(network):
        return reason
    assert isinstance(network, Decoder)
    held = network.norm.weight.dtype
    if DTYPES[spec.train.dtype] != held:
        return f"train.dtype is {spec.train.dtype}, and the base is there in {str(held).removeprefix('torch.')}"
    return None
