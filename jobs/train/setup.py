"""Everything a worker needs before the first step: device, threads, base model, data, network, engine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from jobs.train.artifact import lora_shape
from jobs.train.batches import Batches
from jobs.train.engines import Engine, SingleEngine
from jobs.train.loop import SLOT
from orchestrator.errors import ModelError
from orchestrator.modeling.base_model import BaseModel
from orchestrator.modeling.decoder import Decoder, adapter_parameters, add_adapter
from orchestrator.modeling.dtypes import DTYPES
from orchestrator.modeling.loading import full_parameters, load_model, train_everything
from orchestrator.modeling.network import Network
from orchestrator.modeling.plain import PlainDecoder
from orchestrator.spec.job import FullTuning, JobSpec, QloraTuning, TrainSpec

_VALIDATION_TOKENS = 4096
"""In one forward pass without gradients: nothing is kept for a backward one."""


@dataclass
class Place:
    """Where this worker runs."""

    rank: int = 0
    workers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Sum over the workers."""

    def gathered(self, number: int) -> list[int]:
        """The number (below 2**53) that each rank hands in, by rank, on every rank."""
        numbers = torch.zeros(self.workers, dtype=torch.float64)
        numbers[self.rank] = number
        return [int(one) for one in self.all_reduce(numbers).tolist()]

    def agree(self, wish: str | None) -> str | None:
        """Rank 0's wish, on every rank: they must leave the loop after the same step."""
        return _WISHES[self.gathered(_WISHES.index(wish))[0]]

    def told(self, value: Any) -> Any:
        """What rank 0 hands in (JSON), on every rank."""
        if self.workers == 1:
            return value
        text = json.dumps(value).encode() if self.rank == 0 else b""
        numbers = torch.zeros(self.gathered(len(text))[0], dtype=torch.float64)
        if self.rank == 0:
            numbers += torch.tensor(list(text))
        return json.loads(bytes(int(number) for number in self.all_reduce(numbers)))


_WISHES: list[str | None] = [None, "pause", "cancel"]


@dataclass
class Trainable:
    """A network with what trains it."""

    network: Decoder | PlainDecoder
    model: Network
    """What the loop calls: the network, or the engine that stands for it (DeepSpeed)."""
    engine: Engine
    slot: str | None
    """The trained adapter's slot; None for full tuning."""
    parameters: dict[str, torch.nn.Parameter]
    batches: Batches


def use_threads(cpus: int) -> None:
    """One worker uses all the cores it reserved; Ray's own default is one thread a worker."""
    torch.set_num_threads(max(1, cpus))
    _keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = str(max(1, cpus))


def _keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the system between micro-batches.

    By default each activation is mapped anew, and the kernel zeroes every page of it: in one trial 54,000 page faults an
    optimiser step against 18,000 (0.30 s in the kernel against 0.14 s), with thresholds like these.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # glibc's own upper limit
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 1 << 26)
        mallopt(_M_ARENA_MAX, 1)  # else what one thread freed is no use to another


def pass_over_what_stays() -> None:
    """Have Python's collector leave alone what is there before the first step: it looked at every object of all imported packages
    again and again, which was a twentieth of a small model's time."""
    gc.collect()
    gc.freeze()


def give_back_freed_memory() -> None:
    """What training freed and torch (on a GPU) and glibc, by `use_threads`, keep: memory that evaluation would find taken."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # malloc.h


def uses_deepspeed(spec: JobSpec, place: Place) -> bool:
    return place.workers > 1 or (isinstance(spec.tuning, FullTuning) and place.device.type == "cuda")


def make_trainable(spec: JobSpec, base: BaseModel, place: Place, lengths: Any) -> Trainable:
    """Load the base, add the adapter (or free every weight), plan the steps, and choose the engine.

    Args:
        lengths: tokens of each training row.
    """
    network = load_network(spec, base, place)
    if isinstance(spec.tuning, FullTuning):
        train_everything(network)
        slot, parameters = None, full_parameters(network)
    else:
        slot = SLOT
        add_adapter(network, SLOT, lora_shape(spec.tuning), spec.train.seed)
        parameters = adapter_parameters(network, SLOT)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    network.gradient_checkpointing = spec.train.gradient_checkpointing
    batches = make_batches(spec, lengths, network, place)
    if uses_deepspeed(spec, place):
        from jobs.train.zero import ZeroEngine

        zero = ZeroEngine(network, parameters, spec.train, spec.deepspeed, len(batches.micro_batches(0, 0)))
        return Trainable(network, zero, zero, slot, parameters, batches)
    return Trainable(network, network, SingleEngine(parameters, spec.train), slot, parameters, batches)


def load_network(spec: JobSpec, base: BaseModel, place: Place, *, whole: bool = False) -> Decoder | PlainDecoder:
    """The frozen base in the spec's dtype.

    Args:
        whole: on this rank alone, even if training partitions it (ZeRO-3).
    """
    quantize = None
    if isinstance(spec.tuning, QloraTuning):
        from orchestrator.modeling.quantization import nf4

        quantize = nf4(double_quant=spec.tuning.double_quant)
    building: Any = contextlib.nullcontext()
    if uses_deepspeed(spec, place) and not whole:
        from jobs.train.zero import partitioned

        building = partitioned(spec.train, spec.deepspeed)
    return load_model(
        base.path, dtype=DTYPES[spec.train.dtype], device=place.device, quantize=quantize, building=building
    )


def make_batches(spec: JobSpec, lengths: Any, network: Network, place: Place) -> Batches:
    """The run's optimiser steps, dealt to this many workers."""
    return planned_batches(
        spec.train,
        lengths,
        agreed_micro_batch_tokens(spec.train, network, place, lengths),
        workers=place.workers,
        packing=spec.train.packing and network.packs,
        uniform=uses_deepspeed(spec, place),
    )


def planned_batches(train: TrainSpec, lengths: Any, micro_batch_tokens: int, **options: Any) -> Batches:
    """The optimiser steps that a spec asks for; options as of `Batches`."""
    return Batches(
        lengths,
        batch_size=train.batch_size,
        epochs=train.epochs,
        max_steps=train.max_steps,
        seed=train.seed,
        micro_batch_tokens=micro_batch_tokens,
        **options,
    )


def validation_batches(lengths: Any, network: Network, place: Place, train: TrainSpec) -> Batches:
    """All rows once, in an order that does not matter; what a person does to save memory saves it here too."""
    tokens = train.micro_batch_tokens
    most = _VALIDATION_TOKENS if tokens == "auto" else min(_VALIDATION_TOKENS, 4 * tokens)
    return Batches(
        lengths,
        batch_size=64,
        epochs=1,
        seed=0,
        workers=place.workers,
        micro_batch_tokens=most,
        packing=network.packs,
        uniform=place.workers > 1,
    )


def agreed_micro_batch_tokens(train: TrainSpec, network: Network, place: Place, lengths: Any) -> int:
    """`auto` depends on the memory that is free, which each rank finds another amount of: all take the smallest, since ranks
    that cut the rows differently would skip some, repeat others, and wait for each other in vain."""
    return min(place.gathered(micro_batch_tokens(train, network, place, int(max(lengths)))))


def micro_batch_tokens(train: TrainSpec, network: Network, place: Place, longest: int) -> int:
    """`auto`: what a third of the free memory holds, and no more than what a forward pass gains from.

    Matmuls of a CPU are at their peak from a few hundred tokens; those of a GPU want thousands.
    """
    if train.micro_batch_tokens != "auto":
        return train.micro_batch_tokens
    most = 2048 if place.device.type == "cpu" else 16384
    if not isinstance(network, Decoder):
        return most
    if place.device.type == "cpu":
        free = psutil.virtual_memory().available / place.workers
    else:
        free = torch.cuda.mem_get_info(place.device)[0]
    fits = int(free / 3 / activation_bytes(network, longest, train.gradient_checkpointing))
    return max(64, min(most, fits))


def activation_bytes(network: Decoder, longest: int, recompute: bool) -> int:
    """Bytes that the backward pass needs of each token, about: what the functions of one layer save, times layers."""
    a = network.architecture
    size = network.norm.weight.element_size()
    per_layer = 4 * a.hidden_size + 2 * (a.q_size + 2 * a.kv_size) + 2 * a.q_size
    per_layer += 3 * a.intermediate_size + a.num_heads * min(longest, 512)
    return size * (a.num_layers * a.hidden_size + per_layer if recompute else a.num_layers * per_layer)


@contextlib.contextmanager
def explained(base: Path) -> Iterator[None]:
    """A missing optional package, as a typed error."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = {"deepspeed": "deepspeed", "bitsandbytes": "qlora"}.get(error.name or "", "")
        raise ModelError(
            f"This run needs the package {error.name}, which the cluster's environment does not have.",
            hint=f"Install it: pip install 'adaptory[{extra}]'." if extra else None,
            model=str(base),
        ) from error
