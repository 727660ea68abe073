"""After a memory's read: RMSNorm (arXiv 1910.07467) of every head times a sigmoid gate, one pass on the CPU."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_tasks

TASKS = 16  # blocks of rows: each sums its own gradient of the weight


@functools.cache
def _loops():
    from memzoo.kernels.neural_memory import gated_norm_loops

    return gated_norm_loops


def _rows(x: Tensor, d: int):
    return x.detach().reshape(-1, d).contiguous().numpy()


def _run(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    d, out = len(weight), torch.empty(x.shape, dtype=x.dtype)
    arrays = (_rows(x, d), _rows(weight, d)[0], _rows(gate, d), eps, _rows(out, d))
    run_tasks(_loops().forward, arrays, TASKS, 8 * x.numel())
    return out


_forward = torch.library.custom_op("memzoo::gated_norm", _run, mutates_args=())


@_forward.register_fake
def _(x, weight, gate, eps):
    return x.new_empty(x.shape)


def _run_backward(d_out: Tensor, x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    d = len(weight)
    d_x, d_gate, d_weight = (torch.empty(s, dtype=x.dtype) for s in (x.shape, gate.shape, (TASKS, d)))
    arrays = (_rows(d_out, d), _rows(x, d), _rows(weight, d)[0], _rows(gate, d), eps)
    outputs = (_rows(d_x, d), _rows(d_gate, d), d_weight.numpy())
    run_tasks(_loops().backward, (*arrays, *outputs), TASKS, 16 * x.numel())
    return d_x, d_weight.sum(0), d_gate


_backward = torch.library.custom_op("memzoo::gated_norm_backward", _run_backward, mutates_args=())


@_backward.register_fake
def _(d_out, x, weight, gate, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), gate.new_empty(gate.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


_forward.register_autograd(
    lambda ctx, d_out: (*_backward(d_out, *ctx.saved_tensors, ctx.eps), None), setup_context=_save
)


class _GatedNorm(torch.autograd.Function):
    """The op in eager mode, without its dispatch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_run_backward(d_out, *ctx.saved_tensors, ctx.eps), None


def gated_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """rms_norm(x) weight sigmoid(gate): x [..., H, d], weight [d], gate of as many numbers as x; shaped as gate."""
    dtypes = {x.dtype, weight.dtype, gate.dtype}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    exact = len(dtypes) == 1 or wide == torch.float32
    if exact and x.device.type == "cpu" and is_available() and not torch.compiler.is_exporting():
        tensors = [t.to(wide) for t in (x, weight, gate)]
        with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        run = _forward if torch.compiler.is_compiling() else _GatedNorm.apply if with_grad else _run
        return run(*tensors, eps).view(gate.shape).to(gate.dtype)
    return F.rms_norm(x, weight.shape, weight, eps).reshape(gate.shape) * gate.sigmoid()
