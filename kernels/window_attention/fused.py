"""Windowed attention on the CPU through the compiled loops of loops.py. Numba is optional."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_tasks


@functools.cache
def _loops():
    from memzoo.kernels.window_attention import loops

    return loops


def fits(q: Tensor) -> bool:
    """Whether the loops compute this."""
    known = q.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return q.device.type == "cpu" and known and q.shape[1] > 1 and is_available()


def _flat(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """[B, T, H, d] in place where d is contiguous, and the strides of B, T and H."""
    x = x.detach()
    if x.stride(3) != 1:
        x = x.contiguous()
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.as_strided((span if x.numel() else 0,), (1,)).numpy(), x.stride()[:3]


def _inputs(q, k, v, prefix_k, prefix_v, first, window: int, per: int, scale: float):
    xs, strides = zip(*map(_flat, (q, k, v, prefix_k, prefix_v)))
    window, real = min(window, k.shape[1] // per), xs[0].dtype.type
    return _loops().Inputs(*xs, np.array(strides), first.numpy(), window, per, prefix_k.shape[1], real(scale))


def _work(q: Tensor, k: Tensor, window: int, per: int) -> int:
    return q.numel() * min(window * per, k.shape[1])


def _forward(q, k, v, prefix_k, prefix_v, first, window, per, scale) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    y, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(B, H, T, dtype=q.dtype)
    inputs = _inputs(q, k, v, prefix_k, prefix_v, first, window, per, scale)
    heads, spans = k.shape[2], -(-T // _loops().SPAN)
    arguments = (inputs, heads, y.numpy(), sums.numpy(), T, k.shape[1], spans)
    run_tasks(_loops().forward, arguments, B * heads * spans, _work(q, k, window, per))
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
        *inputs, y, sums = ctx.saved_tensors
        q, k, v, prefix_k, prefix_v, _ = inputs
        grads = [torch.empty(q.shape, dtype=q.dtype)]
        grads += [torch.zeros(x.shape, dtype=x.dtype) for x in (k, v, prefix_k, prefix_v)]
        arrays = [*map(np.asarray, _strided(y)), sums.numpy(), *map(np.asarray, _strided(d_y))]
        arguments = (_inputs(*inputs, *ctx.options), *arrays, *(x.numpy() for x in grads))
        window, per, _ = ctx.options
        run_tasks(_loops().backward, arguments, k.shape[0] * k.shape[2], 2 * _work(q, k, window, per))
        return *grads, *(None,) * 4


def _strided(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    array, strides = _flat(x)
    return array, np.array(strides)


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
