"""Linear maps of a row after a root mean square norm (arXiv 1910.07467): W_i h, h = x / sqrt(mean(x^2) + eps).

On the CPU in single or double precision h is never formed, forward or backward: its factor, one number a row, is taken
out of the products. Half precision normalises first, so that no product is out of range.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.rms_norm import rms_norm

__all__ = ["normed_linear"]


def normed_linear(x: Tensor, weights: list[Tensor], eps: float) -> list[Tensor]:
    """x [..., D], weights [E_i, D] -> [..., E_i] each. Differentiable once."""
    if torch.compiler.is_compiling() or not _fits(x, weights):
        h = rms_norm(x, None, eps)
        return [F.linear(h, weight) for weight in weights]
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        outputs = _NormedLinear.apply(rows, eps, *weights)
    else:
        outputs, _ = _forward(rows, eps, weights)
    return [y.view(*x.shape[:-1], -1) for y in outputs]


def _fits(x: Tensor, weights: list[Tensor]) -> bool:
    same = x.dtype in (torch.float32, torch.float64) and all(weight.dtype == x.dtype for weight in weights)
    return x.device.type == "cpu" and same and not torch.is_autocast_enabled("cpu")


def _forward(rows: Tensor, eps: float, weights: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """The outputs [n, E_i] and the factors [n, 1]."""
    mean = torch.linalg.vector_norm(rows, dim=1, keepdim=True).square_().div_(rows.shape[1])
    inverse = mean.add_(eps).rsqrt_()
    return tuple(torch.mm(rows, weight.mT).mul_(inverse) for weight in weights), inverse


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs, inverse = _forward(rows, eps, weights)
        ctx.save_for_backward(rows, inverse, *weights, *outputs)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """With g = dy / rms: dW = g' x, dx = g W - x sum(g y) / (D rms)."""
        rows, inverse, *saved = ctx.saved_tensors
        n, needed = len(grads), ctx.needs_input_grad
        scaled = [None if grad is None else grad * inverse for grad in grads]
        d_weights = [g.mT @ rows if g is not None and needed[2 + i] else None for i, g in enumerate(scaled)]
        if not needed[0]:
            return None, None, *d_weights
        along = sum((g * y).sum(1, keepdim=True) for g, y in zip(scaled, saved[n:]) if g is not None)
        d_rows = rows * (along * inverse).div_(-rows.shape[1])
        for g, weight in zip(scaled, saved[:n]):
            if g is not None:
                d_rows.addmm_(g, weight)
        return d_rows, None, *d_weights
