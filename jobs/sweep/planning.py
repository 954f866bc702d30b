"""How many trials are trained at once, and how many of them go through the network together: by memory, and by what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
FULL = {"cpu": 512, "cuda": 16384}
"""Tokens of a pass from which a device's matmuls are at their peak."""
TRIED_STEPS = 2
TRIED_SECONDS = 2.0
"""After which one step is enough."""


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


class Way(NamedTuple):
    """How a step's micro-batches go through the network."""

    together: int = 1
    """Most lanes in a pass."""
    beside: int = 1
    """Passes that are computed at the same time, each with its share of the cores."""

    def __str__(self) -> str:
        words = [f"{self.together} together" if self.together != 1 else ""]
        words += [f"{self.beside} beside each other" if self.beside > 1 else ""]
        return ", ".join(word for word in words if word) or "one by one"


Counted = list[tuple[int, int]]
"""Of each pass: lanes and tokens."""


@dataclass
class Pace:
    """Which way is fastest: 2, 4, … passes are tried beside each other, as long as that gains and there are cores and lanes; then 2, 4, …
    lanes together, as long as passes are short of `full`. Each is tried for two steps, or for one that takes long. The steps are real
    ones: only rounding differs.

    The first step of all is not counted, since it makes what later ones find.

    Args:
        cores: of this process, if it computes on them.
        full: tokens of a pass that gains nothing from more.
    """

    cores: int = 1
    full: int = 2**62
    clock: Callable[[], float] = time.perf_counter
    seen: dict[Way, list[float]] = field(default_factory=dict)
    """Way → steps, tokens, seconds, passes, and the most lanes that there were in one: it may have no room for as many."""
    _warm: bool = False

    def way(self, lanes: int) -> Way:
        """Of the next step of so many lanes."""
        best = Way()
        while (more := Way(beside=2 * best.beside)).beside <= min(lanes, self.cores):
            if untried := self._untried(best, more):
                return untried
            if self.speed(more) <= self.speed(best):
                break
            best = more
        while (wider := best._replace(together=2 * best.together)).together <= lanes:
            if untried := self._untried(best):
                return untried
            if self._tokens_of_a_pass(best) >= self.full:
                break
            if untried := self._untried(wider):
                return untried
            if self._reached(wider) < wider.together or self.speed(wider) <= self.speed(best):
                break
            best = wider
        return self.fastest(lanes)

    def fastest(self, lanes: int) -> Way:
        """Of those that were tried, for so many lanes."""
        best = max(self.seen, key=self.speed, default=Way())
        return Way(min(best.together, lanes), best.beside)

    def speed(self, way: Way) -> float:
        """Tokens a second."""
        _, tokens, seconds, *_ = self.seen[way]
        return tokens / max(seconds, 1e-9)

    def _tokens_of_a_pass(self, way: Way) -> float:
        _, tokens, _, passes, _ = self.seen[way]
        return tokens / passes

    def _reached(self, way: Way) -> float:
        return self.seen[way][-1]

    def _untried(self, *ways: Way) -> Way | None:
        for way in ways:
            steps, _, seconds, *_ = self.seen.get(way, [0, 0, 0])
            if steps < TRIED_STEPS and seconds < TRIED_SECONDS:
                return way
        return None

    @contextmanager
    def step(self, way: Way) -> Iterator[Counted]:
        """Times a step that is computed in the block; each pass is added to what is given."""
        counted: Counted = []
        began = self.clock()
        yield counted
        if not self._warm or not counted:
            self._warm = True
            return
        steps, tokens, seconds, passes, reached = self.seen.get(way, [0.0] * 5)
        self.seen[way] = [
            steps + 1,
            tokens + sum(tokens for _, tokens in counted),
            seconds + self.clock() - began,
            passes + len(counted),
            max(reached, *(lanes for lanes, _ in counted)),
        ]

    @property
    def why(self) -> str:
        """What was measured, for a person."""
        tried = [way for way in self.seen if self._reached(way) == way.together]
        if not tried:
            return "one copy of the base model for all trials"
        figures = ", ".join(f"{self.speed(way):,.0f} tokens/s {way}" for way in tried)
        return f"one copy of the base model for all trials; measured {figures}"
