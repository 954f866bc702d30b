"""DeepSpeed ZeRO as an engine (arXiv:1910.02054). The only module that imports deepspeed.

The loop's network is wrapped so that DeepSpeed sees one module whose forward pass gives the loss: ZeRO-3 gathers weights
by hooks on calls. State crosses by full fp32 tensors by name, so a checkpoint fits any number of workers and any stage.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jobs.train.engines import State
from orchestrator.modeling.network import Network
from orchestrator.spec.job import DeepSpeedSpec, TrainSpec

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402 - it reads the accelerator when it is imported
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

# Its all-reduce in shared memory is compiled at the first use, for most of a minute; gloo does as well for so little.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Called(nn.Module):
    """A network whose methods are forward passes."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.network, method)(*arguments)


class ZeroEngine:
    """AdamW under DeepSpeed, and the network to use in its place: `engine.loss(…)`.

    Args:
        network: on every rank the same.
        parameters: the trained Parameters by name.
        accumulation: micro-batches per optimiser step of each rank.
    """

    def __init__(
        self,
        network: Network,
        parameters: dict[str, nn.Parameter],
        train: TrainSpec,
        spec: DeepSpeedSpec,
        accumulation: int,
    ):
        self.network, self._parameters = network, parameters
        self._accumulation, self._sharded_weights = accumulation, spec.stage == 3
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=_Called(network),
            model_parameters=list(parameters.values()),
            config=configuration(train, spec, accumulation),
        )
        self.packs = network.packs

    # in place of the network

    def loss(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._engine("loss", *arguments)

    def logits(self, *arguments: Any) -> Tensor:
        return self._engine("logits", *arguments)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    # as an engine

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._accumulation)  # it divides by its accumulation steps
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def state(self) -> State | None:
        out: State = {"weights": {}, **{kind: {} for kind in _MOMENTS}}
        keep = torch.distributed.get_rank() == 0
        for name, parameter in self._parameters.items():
            full = {"weights": safe_get_full_fp32_param(parameter)}
            full |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _MOMENTS}
            for kind, value in full.items():
                if keep:
                    assert value is not None, f"DeepSpeed gave no {kind} for {name}"
                    out[kind][name] = value.detach().to("cpu", torch.float32, copy=True).view(_shape(parameter))
        return out if keep else None

    def load(self, state: State, step: int) -> None:
        for flat in self._flat_masters():
            # DeepSpeed makes the moments in its first step; a resumed run needs them before
            self._optimizer.optimizer.state[flat] = {
                "step": torch.tensor(float(step)),
                **{kind: torch.zeros_like(flat) for kind in _MOMENTS},
            }
        if not self._sharded_weights:
            self._optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._parameters.items():
            self._set(parameter, state["weights"][name], None)
            for kind in _MOMENTS:
                self._set(parameter, state[kind][name], kind)
            with gathered([parameter], modifier_rank=0) if self._sharded_weights else contextlib.nullcontext():
                parameter.data.copy_(state["weights"][name])

    def _flat_masters(self) -> list[Tensor]:
        """This rank's part of the masters, as the optimiser inside sees them."""
        if self._sharded_weights:  # there the optimiser holds a part only while it steps it
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._optimizer.optimizer.param_groups for flat in group["params"]]

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Set a master, or one of its moments, from a full tensor; each rank keeps its part."""
        if not self._sharded_weights:
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
            return
        # safe_set_full_* does not pad, so it fails where a weight does not divide by the workers: set each part
        part = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        flat = nn.functional.pad(value.flatten(), (0, part * torch.distributed.get_world_size() - value.numel()))
        local = flat.narrow(0, part * torch.distributed.get_rank(), part)
        if moment is None:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, moment)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def configuration(train: TrainSpec, spec: DeepSpeedSpec, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of this run."""
    zero: dict[str, Any] = {"stage": spec.stage, "overlap_comm": False}
    if spec.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if spec.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.betas),
                "eps": train.eps,
                "weight_decay": train.weight_decay,
                "torch_adam": True,  # DeepSpeed's C++ Adam would be compiled first
            },
        },
        "steps_per_print": 10**9,
    }


@contextlib.contextmanager
def partitioned(train: TrainSpec, spec: DeepSpeedSpec) -> Iterator[None]:
    """While a network is built inside, ZeRO-3 partitions each weight as it is read, so that no rank ever holds all."""
    if spec.stage != 3:
        yield
        return
    import torch._dynamo  # it inspects tensor constructors when it is imported, which zero.Init replaces

    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    with deepspeed.zero.Init(config_dict_or_path=configuration(train, spec, 1)):
        yield


def gathered(parameters: list[nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Inside, the Parameters are whole on every rank (ZeRO-3); what `modifier_rank` writes to them is kept."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
