"""How many trials are trained at once, and how many of them go through the network together: by memory, and by what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from jobs.train.artifact import lora_shape
from jobs.train.setup import Place
from orchestrator.errors import OutOfMemory
from orchestrator.modeling.decoder import Decoder
from orchestrator.modeling.lora import FusedLinear
from orchestrator.spec.job import JobSpec, LoraTuning
from orchestrator.spec.sweep import trial_spec

LANES = 8
"""Most where `sweep.max_concurrent` is auto: more give no speed once a pass is full, and each costs memory."""
SHARE = 1 / 3
"""Of the free memory that lanes may take; activations take as much (`jobs.train.setup.micro_batch_tokens`)."""
TRIED_STEPS = 2


# --- memory ---------------------------------------------------------------------------------------------------------


def lanes(spec: JobSpec, network: Any, place: Place) -> int:
    """How many trials are trained at once.

    Raises:
        OutOfMemory: `sweep.max_concurrent` says more than the memory holds, or it holds not even one.
    """
    assert spec.sweep is not None
    asked = spec.sweep.max_concurrent
    if not isinstance(network, Decoder):
        return 1  # nothing is ever packed on the plain path
    tuning = _largest(spec)
    each = lane_bytes(network, tuning)
    free = min(place.gathered(_free(place)))
    fit = int(free * SHARE / each)
    if fit >= (1 if asked == "auto" else asked):
        return min(LANES, fit) if asked == "auto" else asked
    raise OutOfMemory(
        f"sweep.max_concurrent: {asked}, and there is memory for {fit}: each trial of rank {tuning.rank} takes {_mib(each)} beside the "
        f"base model, and of the {_mib(free)} that are free they may have a third.",
        hint=f"Set sweep.max_concurrent to {fit} or less."
        if fit
        else "Lower the ranks that are searched, or use a larger node.",
        max_concurrent=asked,
        fit=fit,
    )


def lane_bytes(network: Decoder, tuning: LoraTuning) -> int:
    """Bytes of a trial's weights and their gradient in the dtype of training, and of AdamW's state with its fp32 masters."""
    shape, parameters = lora_shape(tuning), 0
    for linear in (module for module in network.modules() if isinstance(module, FusedLinear)):
        chosen = [p for p in linear.projections if shape.covers(p.name)]
        parameters += shape.rank * sum(linear.in_features + p.stop - p.start for p in chosen)
    size = network.norm.weight.element_size()
    return parameters * (16 if size == 4 else 2 * size + 16)


def _largest(spec: JobSpec) -> LoraTuning:
    """The tuning of the trial that takes most."""
    assert spec.sweep is not None
    space = spec.sweep.space
    config: dict[str, Any] = {}
    if ranks := space.get("tuning.rank"):
        config["tuning.rank"] = int(max(ranks.ends))
    if "tuning.targets" in space:
        config["tuning.targets"] = "all-linear"
    tuning = trial_spec(spec, config).tuning
    assert isinstance(tuning, LoraTuning)
    return tuning


def _free(place: Place) -> int:
    if place.device.type == "cuda":
        return torch.cuda.mem_get_info(place.device)[0]
    return psutil.virtual_memory().available // place.workers


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


# --- speed ----------------------------------------------------------------------------------------------------------


@dataclass
class Pace:
    """How many lanes' micro-batches go through the network together: 1, 2, 4, … are tried for two steps each while there are so
    many, and the fastest is kept. The steps are real ones: only rounding differs.

    The first step of all is not counted, since it makes what later ones find.
    """

    clock: Callable[[], float] = time.perf_counter
    seen: dict[int, list[float]] = field(default_factory=dict)
    """Most lanes in a pass → steps, tokens, seconds, and the most that there were: a pass may have no room for as many."""
    _warm: bool = False

    def together(self, lanes: int) -> int:
        """Most lanes in a pass of the next step."""
        candidate = 1
        while candidate <= lanes:
            steps, _, _, reached = self.seen.get(candidate, [0, 0, 0, 0])
            if steps < TRIED_STEPS:
                return candidate
            if reached < candidate:
                break
            candidate *= 2
        return min(self.fastest, lanes)

    @property
    def fastest(self) -> int:
        """Of those that were tried."""
        return max(self.seen, key=self.speed, default=1)

    def speed(self, together: int) -> float:
        """Tokens a second."""
        _, tokens, seconds, _ = self.seen[together]
        return tokens / max(seconds, 1e-9)

    @contextmanager
    def step(self, asked: int) -> Iterator[list[tuple[int, int]]]:
        """Times a step that is computed in the block; each pass is added to what is given: (lanes, tokens)."""
        passes: list[tuple[int, int]] = []
        began = self.clock()
        yield passes
        if not self._warm or not passes:
            self._warm = True
            return
        steps, tokens, seconds, reached = self.seen.get(asked, [0.0, 0.0, 0.0, 0.0])
        self.seen[asked] = [
            steps + 1,
            tokens + sum(tokens for _, tokens in passes),
            seconds + self.clock() - began,
            max(reached, *(lanes for lanes, _ in passes)),
        ]

    @property
    def why(self) -> str:
        """What was measured, for a person."""
        tried = [asked for asked, (_, _, _, reached) in sorted(self.seen.items()) if reached == asked]
        if not tried:
            return "one copy of the base model for all trials"
        figures = ", ".join(
            f"{self.speed(n):,.0f} tokens/s {'one by one' if n == 1 else f'{n} together'}" for n in tried
        )
        return f"one copy of the base model for all trials; measured {figures}"
