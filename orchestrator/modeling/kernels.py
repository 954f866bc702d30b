"""The elementwise parts of a decoder, each as one autograd function with a backward written by hand.

Autograd's own graph of a norm, a rotation or a gate makes two to three times the passes over memory and keeps an fp32
copy of every intermediate; on a CPU those passes cost as much as the matmuls. All take flat tokens, `[tokens, …]`.
A GPU takes some of them from `triton_kernels`, where it can compile.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


def _triton(tensor: Tensor) -> Any:
    """`triton_kernels`, or None where torch's own operations do the same."""
    return _triton_on(tensor.device) if tensor.is_cuda else None


@lru_cache
def _triton_on(device: torch.device) -> Any:
    try:
        from orchestrator.modeling import triton_kernels

        triton_kernels.tried(device)
    except (
        Exception
    ) as error:  # no Triton, no C compiler, a GPU that it does not know: whatever it is, there is another way
        log.warning(
            "Triton does not compile here, so training takes longer (Debian and Ubuntu: apt-get install gcc): %s", error
        )
        return None
    return triton_kernels


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.offset, ctx.whole = offset, x.is_cuda and not offset
        if ctx.whole:  # torch has it as one kernel, which computes in fp32 as well
            out, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
            ctx.save_for_backward(x, weight, inverse)
            return out
        # vector_norm accumulates in fp32 without writing a squared copy
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(_scale(weight, offset)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if ctx.whole:
            wanted = [True, ctx.needs_input_grad[1]]
            given = torch.ops.aten._fused_rms_norm_backward(grads[0], x, x.shape[-1:], inverse, weight, wanted)
            return given[0], given[1] if wanted[1] else None, None, None
        normed = x * inverse  # fp32
        grad_normed = grads[0] * _scale(weight, ctx.offset)
        projection = (grad_normed * normed).mean(-1, keepdim=True).neg_()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grads[0] * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        grad_x = grad_normed.addcmul_(normed, projection).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None, None


def _scale(weight: Tensor, offset: float) -> Tensor:
    scale = weight.float()
    return scale + offset if offset else scale


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) · (weight + offset) over the last dimension, computed in fp32 (arXiv:1910.07467)."""
    return _RmsNorm.apply(x, weight, eps, offset)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        if triton := _triton(gate_up):
            return triton.gate(gate_up, activation)
        gate, up = gate_up.chunk(2, -1)
        return _activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        if triton := _triton(gate_up):
            return triton.gate_backward(grads[0], gate_up, ctx.activation), None
        gate, up = gate_up.chunk(2, -1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(grads[0], _activate(gate, ctx.activation), out=grad_up)
        torch.mul(grads[0], up, out=grad_gate)
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        else:
            torch.ops.aten.gelu_backward.grad_input(grad_gate, gate, approximate="tanh", grad_input=grad_gate)
        return grad, None


def _activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) · up: [tokens, 2·intermediate] → [tokens, intermediate] (arXiv:2002.05202)."""
    return _GatedActivation.apply(gate_up, activation)


class _Rotate(torch.autograd.Function):
    """Rotates the leading heads of its input in place: nothing needs their values from before.

    Its input is whole, never a view: autograd copies what is changed through a view, twice.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, rotated: int, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.mark_dirty(flat)
        ctx.save_for_backward(cos, sin)
        ctx.rotated = rotated
        if triton := _triton(flat):
            triton.rotate(flat, flat, rotated, cos, sin)
            return flat
        _rotate_(_heads(flat, cos)[:, :rotated], cos, sin)
        return flat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if triton := _triton(cos):
            read = grads[0].contiguous()
            grad = torch.empty_like(read)
            triton.rotate(read, grad, ctx.rotated, cos, sin, back=True)
            return grad, None, None, None
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        _rotate_(_heads(grad, cos)[:, : ctx.rotated], cos, -sin)
        return grad, None, None, None


def _heads(flat: Tensor, cos: Tensor) -> Tensor:
    return flat.view(len(flat), -1, 2 * cos.shape[-1])


def _rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    first, second = heads.chunk(2, -1)
    turned = first * cos
    turned.addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)


def rotate(flat: Tensor, rotated: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first `rotated` heads, in place (arXiv:2104.09864).

    Args:
        flat: [tokens, heads · head_dim].
        cos, sin: [tokens, 1, head_dim / 2], of the same dtype.
    """
    return _Rotate.apply(flat, rotated, cos, sin)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and input gradient chunk by chunk, so that the logits of few tokens exist at a time.

    The gradient is made in the forward pass, as in Liger Kernel (arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        chunk = max(_CHUNK, _LOGITS_ON_GPU // len(weight)) if hidden.is_cuda else _CHUNK
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.t()
            grad = _logits_gradient(
                logits, labels[rows], token_weights[rows], losses[rows], softcap, needs_hidden or needs_weight
            )
            if grad is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0].to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _logits_gradient(
    logits: Tensor, labels: Tensor, token_weights: Tensor, losses: Tensor, softcap: float | None, wanted: bool
) -> Tensor | None:
    """Write each token's loss, and give the weighted gradient of its logits [tokens, vocab] if it is wanted; may overwrite them."""
    if not softcap and (triton := _triton(logits)):
        triton.cross_entropy(logits, labels, token_weights, losses, wanted)
        return logits if wanted else None
    dtype, logits = logits.dtype, logits.float()
    if softcap:
        capped = logits.div_(softcap).tanh_()
        slope = 1 - capped.square()
        logits = capped * softcap
    normaliser = torch.logsumexp(logits, -1, keepdim=True)
    target = labels[:, None]
    losses.copy_((normaliser - logits.gather(1, target)).squeeze(1))
    if not wanted:
        return None
    grad = logits.sub_(normaliser).exp_()
    grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
    grad.mul_(token_weights[:, None])
    if softcap:
        grad.mul_(slope)
    return grad.to(dtype)


_CHUNK = 128  # tokens; 128 × 49,152 logits in fp32 are 25 MB
_LOGITS_ON_GPU = 2**26  # at a time, 256 MB: small chunks would leave a GPU waiting for the next launch


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses, without ever holding all logits.

    Args:
        hidden: [labelled, hidden_size], only the positions that have a label.
        weight: [vocab, hidden_size], the output head.
        labels: [labelled], int64.
        token_weights: [labelled], fp32; each token's loss is multiplied by its weight (usually 1 / labelled tokens).
        softcap: logits become cap · tanh(logits / cap) (Gemma2).

    Returns:
        The weighted sum (differentiable) and the unweighted loss of each token ([labelled], fp32).
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, token_weights, softcap)
