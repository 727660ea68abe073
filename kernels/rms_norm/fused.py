"""The norm and its gradient through the numba loops of loops.py."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_parts

TASKS = 16  # blocks of rows: each sums its own gradient of the weight


@functools.cache
def _loops():
    from memzoo.kernels.rms_norm import loops

    return loops


def fits(x: Tensor, weight: Tensor | None) -> bool:
    same = weight is None or weight.dtype == x.dtype
    return x.device.type == "cpu" and same and x.dtype in (torch.float32, torch.float64) and is_available()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RMSNorm.apply(x, weight, eps)
    return _forward(x, weight, eps)[0]


def _rows(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1, x.shape[-1])


def _forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    y, inverse = torch.empty_like(rows), rows.new_empty(len(rows))
    factors = rows.new_ones(rows.shape[1]) if weight is None else weight.detach().contiguous()
    loops, arguments = _loops(), (rows.numpy(), factors.numpy(), eps, y.numpy(), inverse.numpy())
    run_parts(loops.forward, loops.forward_region, arguments, rows.numel() // 8)
    return y.view(x.shape), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, inverse = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        rows = _rows(x)
        d_rows, d_weight = torch.empty_like(rows), rows.new_empty(TASKS, rows.shape[1])
        factors = rows.new_ones(rows.shape[1]) if weight is None else weight.detach().contiguous()
        loops, tensors = _loops(), (_rows(grad), rows, factors, inverse, d_rows, d_weight)
        run_parts(loops.backward, loops.backward_region, tuple(v.numpy() for v in tensors), rows.numel() // 4)
        return d_rows.view(x.shape), None if weight is None else d_weight.sum(0), None
