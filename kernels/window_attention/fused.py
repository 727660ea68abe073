"""Windowed attention on the CPU through the compiled loops of loops.py. Numba is optional."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_parts


@functools.cache
def _loops():
    from memzoo.kernels.window_attention import loops

    return loops


def fits(q: Tensor) -> bool:
    """Whether the loops compute this."""
    known = q.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return q.device.type == "cpu" and known and q.shape[1] > 1 and is_available()


def _rows(*tensors: Tensor) -> list[Tensor]:
    """[B, T, H, d] with d contiguous: in place where it is."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


def _places(rows: list[Tensor]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Addresses, which cost less to hand over than arrays do, and strides of B, T and H."""
    return tuple(x.data_ptr() for x in rows), tuple(x.stride()[:3] for x in rows)


def _options(first: Tensor, window: int, per: int, scale: float, q: Tensor, k: Tensor, prefix_k: Tensor) -> tuple:
    real = np.float32 if q.dtype == torch.float32 else np.float64
    return first.numpy(), min(window, k.shape[1] // per), per, prefix_k.shape[1], real(scale)


def _work(q: Tensor, k: Tensor, window: int, per: int) -> int:
    return q.numel() * min(window * per, k.shape[1])


def _forward(q, k, v, prefix_k, prefix_v, first, window, per, scale) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    y, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, T, dtype=q.dtype)
    rows, loops = _rows(q, k, v, prefix_k, prefix_v), _loops()
    options, sizes = _options(first, window, per, scale, q, k, prefix_k), (k.shape[2], k.shape[1])
    arguments = (*_places(rows), options, sizes, y.numpy(), sums.numpy())
    run_parts(loops.forward, loops.forward_region, arguments, _work(q, k, window, per))
    return y, sums


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, prefix_k, prefix_v, first, *ctx.options = inputs
        y, sums = _forward(*inputs)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, first, y, sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, first, y, sums = ctx.saved_tensors
        grads = [torch.empty(q.shape, dtype=q.dtype)]
        grads += [torch.zeros(x.shape, dtype=x.dtype) for x in (k, v, prefix_k, prefix_v)]
        rows, loops = _rows(q, k, v, prefix_k, prefix_v, y, d_y), _loops()
        window, per, scale = ctx.options
        options = _options(first, window, per, scale, q, k, prefix_k)
        arguments = (*_places(rows), options, sums.numpy(), *(x.numpy() for x in grads))
        run_parts(loops.backward, loops.backward_region, arguments, 2 * _work(q, k, window, per))
        return *grads, *(None,) * 4


def window_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, first: Tensor, window: int, per: int
) -> Tensor:
    """Arguments as those of the public op, but with `first` and `window` given."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if prefix is None:
        prefix = (k.new_empty(k.shape[0], 0, *k.shape[2:]),) * 2
    tensors = [x.to(wide) for x in (q, k, v, *prefix)]
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    options = (first.contiguous(), window, per, q.shape[-1] ** -0.5)
    y = _WindowAttention.apply(*tensors, *options) if with_grad else _forward(*tensors, *options)[0]
    return y.to(q.dtype)
