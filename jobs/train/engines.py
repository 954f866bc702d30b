"""How gradients become new weights: alone, or (in `jobs.train.zero`) by DeepSpeed over several workers.

Trained weights have fp32 masters; the forward pass uses copies in the working dtype. State is exchanged by parameter
name and does not depend on the number of workers.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from orchestrator.spec.job import TrainSpec

State = dict[str, dict[str, Tensor]]
"""`weights`, `exp_avg`, `exp_avg_sq`: parameter name → fp32 tensor on the CPU."""


class Engine(Protocol):
    """What the loop needs of an optimiser."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's share of the step's loss."""

    def step(self, learning_rate: float) -> float:
        """Apply the accumulated gradient; returns its global norm before clipping.

        A norm that is not finite leaves the weights as they were.
        """

    def state(self) -> State | None:
        """Copies of masters and moments; every rank must call it, rank 0 gets them and the others None."""

    def load(self, state: State, step: int) -> None:
        """Continue from what `state` gave after `step` steps; every rank must call it."""


class _Moments(NamedTuple):
    """What AdamW keeps of a weight."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """A number, in fp32 and where the weight is: the fused kernel counts it up."""


def _fresh(master: Tensor) -> _Moments:
    return _Moments(torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device=master.device))


class SingleEngine:
    """AdamW on one worker, by torch's function: `torch.optim.AdamW` imports torch's compiler, which takes seconds and is of no use here.

    Args:
        parameters: the trained Parameters by name.
        steady: have memory for gradients and moments from the beginning to the end. Made when they are needed, each lies among the
            activations of that moment, and leaves holes between them that fit nothing: of many engines, that adds up.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], train: TrainSpec, steady: bool = False):
        self._parameters, self._steady = parameters, steady
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in parameters.items()
        }
        self._moments: dict[str, _Moments] = {}
        """Of each weight that has had a gradient; where it is steady, of all."""
        self._train = train
        if steady:
            for name, master in self._masters.items():
                master.grad = torch.zeros_like(master)
                self._moments[name] = _fresh(master)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.collect()

    def collect(self) -> None:
        """Accumulate the gradient that a backward pass left at the Parameters: of a loss that others have a part in, too."""
        fresh: list[tuple[Tensor, Tensor]] = []
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue  # fp32 weights accumulate in place
            if master.grad is None:
                master.grad = torch.empty_like(master)
                fresh.append((master.grad, parameter.grad))
            else:
                master.grad += parameter.grad
            parameter.grad = None
        _copy_each(fresh)

    def gradients(self) -> list[Tensor]:
        """What has accumulated, to be changed in place; zeros where nothing has."""
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self._masters.values() if master.grad is not None]

    def take_gradients(self, other: SingleEngine) -> None:
        """Of weights that are the same: what has accumulated there has accumulated here."""
        torch._foreach_copy_(self.gradients(), other.gradients())

    def step(self, learning_rate: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._masters.values(), self._train.max_grad_norm or float("inf"))
        if torch.isfinite(norm):
            self._move(learning_rate)
            self._copy_back()
        for master in self._masters.values():
            if self._steady and master.grad is not None:
                master.grad.zero_()
            else:
                master.grad = None
        return norm.item()

    @torch.no_grad()
    def _move(self, learning_rate: float) -> None:
        moved = [(name, master, master.grad) for name, master in self._masters.items() if master.grad is not None]
        for name, master, _ in moved:
            if name not in self._moments:
                self._moments[name] = _fresh(master)
        kept = [self._moments[name] for name, *_ in moved]
        adamw(
            [master for _, master, _ in moved],
            [gradient for *_, gradient in moved],
            [one.exp_avg for one in kept],
            [one.exp_avg_sq for one in kept],
            [],
            [one.step for one in kept],
            fused=True,
            amsgrad=False,
            beta1=self._train.betas[0],
            beta2=self._train.betas[1],
            lr=learning_rate,
            weight_decay=self._train.weight_decay,
            eps=self._train.eps,
            maximize=False,
        )

    def state(self) -> State | None:
        state: State = {"weights": {name: _copy(master) for name, master in self._masters.items()}}
        for kind in ("exp_avg", "exp_avg_sq"):
            held = {name: getattr(one, kind) for name, one in self._moments.items()}
            state[kind] = {
                name: _copy(held.get(name, torch.zeros_like(master))) for name, master in self._masters.items()
            }
        return state

    def load(self, state: State, step: int) -> None:
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state["weights"][name])
                first, second = (state[kind][name].to(master.device, copy=True) for kind in ("exp_avg", "exp_avg_sq"))
                self._moments[name] = _Moments(first, second, torch.tensor(float(step), device=master.device))
        self._copy_back()

    def _copy_back(self) -> None:
        with torch.no_grad():
            pairs = [(parameter, self._masters[name]) for name, parameter in self._parameters.items()]
            _copy_each([(parameter, master) for parameter, master in pairs if master is not parameter])


def _copy_each(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """The second of each into the first: on a GPU by a few launches, not one for each of hundreds."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [what for _, what in pairs])


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
