"""Selective scan on CPU through the Numba kernels of `fused_kernels.py`: nothing of size [B, I, T, N] ever exists.

Mamba (arXiv 2312.00752), section 3.3.2: the discretised tensors live in fast memory only, states are recomputed in the
backward pass. Numba is optional; it compiles at the first call (about three seconds, then cached on disk).
Sequences are read in place when channels are contiguous ([B, T, I] memory, as the models have it), else copied once.
"""

import functools
import os

import numpy as np
import torch
from torch import Tensor

from memzoo.kernels.selective_scan.common import CHUNK, ScanGradients, ScanInputs
from memzoo.kernels.threads import run_parts, run_tasks


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether Numba is there and not switched off by its own NUMBA_DISABLE_JIT."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0") and _numba_imports()


@functools.cache
def _numba_imports() -> bool:
    try:
        import numba  # noqa: F401
    except Exception:  # numba raises various errors on a NumPy it does not know
        return False
    return True


@functools.cache
def _kernels():
    from memzoo.kernels.selective_scan import fused_kernels

    return fused_kernels


@functools.cache
def _conv_kernels():
    from memzoo.kernels.selective_scan import conv_kernels

    return conv_kernels


def _flat(x: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """[B, I, T] as a flat array with contiguous channels, and its strides over batch and time."""
    x = x.detach().transpose(1, 2)  # [B, T, I]
    if x.stride(2) != 1 or min(x.stride()) < 1:
        x = x.contiguous()
    batch, time, channels = x.shape
    span = (batch - 1) * x.stride(0) + (time - 1) * x.stride(1) + channels
    return x.as_strided((span,), (1,)).numpy(), (x.stride(0), x.stride(1))


def _prepare(inputs: ScanInputs, *more: Tensor) -> tuple[tuple, np.ndarray, tuple]:
    """Arguments common to both kernels: flat sequences (u, delta, z, B, C, *more), strides, (A, D, bias, mask)."""
    u, delta, A, B, C, D, z, bias, _, mask, _ = inputs
    arrays, strides = zip(*[_flat(x) for x in (u, delta, u if z is None else z, B, C, *more)])
    zeros = u.new_zeros(A.shape[0])
    D, bias = (zeros if x is None else x.detach().contiguous() for x in (D, bias))
    mask = torch.ones(1, 1, dtype=torch.bool) if mask is None else mask.contiguous()
    return arrays, np.array(strides), (A.detach().t().contiguous().numpy(), D.numpy(), bias.numpy(), mask.numpy())


def _sizes(inputs: ScanInputs) -> tuple[int, int, int, int, int]:
    batch, channels, time = inputs.u.shape
    return batch, time, channels, inputs.A.shape[1], -(-channels // _kernels().BLOCK)


def forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [B, I, T], final state [B, I, N], the states at the K chunk starts [B, K, N I] (none if not save)."""
    batch, time, channels, states, blocks = _sizes(inputs)
    arrays, strides, (A, D, bias, mask) = _prepare(inputs)
    new = inputs.u.new_empty
    initial = inputs.initial_state
    initial = inputs.u.new_zeros(batch, channels, states) if initial is None else initial.detach().contiguous()
    y, final = new(batch, time, channels), new(batch, channels, states)
    starts = new(batch, -(-time // CHUNK) if save else 0, states * channels)
    arguments = (
        *arrays, strides, A, D, bias, initial.numpy(), mask, y.numpy(), final.numpy(),
        starts.view(batch, -1 if save else 0, states, channels).numpy(),
        inputs.delta_softplus, inputs.z is not None, inputs.mask is not None, save, CHUNK,
    )  # fmt: skip
    run_tasks(_kernels().forward, arguments, batch * blocks, batch * time * channels * states)
    return y.transpose(1, 2), final, starts


def backward(inputs: ScanInputs, starts: Tensor, grad_y: Tensor, grad_final: Tensor | None) -> ScanGradients:
    batch, time, channels, states, blocks = _sizes(inputs)
    arrays, strides, (A, D, bias, mask) = _prepare(inputs, grad_y)
    new = inputs.u.new_empty
    if grad_final is None:
        grad_final = inputs.u.new_zeros(batch, channels, states)
    grad_u, grad_delta = new(batch, time, channels), new(batch, time, channels)
    grad_z = new(batch, time if inputs.z is not None else 0, channels)
    grad_A, grad_initial = new(batch, states, channels), new(batch, channels, states)
    grad_B, grad_C = new(blocks, batch, time, states), new(blocks, batch, time, states)
    grad_D, grad_bias = new(batch, channels), new(batch, channels)
    outputs = (grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial)
    arguments = (
        *arrays, strides, A, D, bias, mask, starts.view(batch, -1, states, channels).numpy(),
        grad_final.contiguous().numpy(), *(x.numpy() for x in outputs),
        inputs.delta_softplus, inputs.z is not None, inputs.mask is not None, CHUNK,
    )  # fmt: skip
    run_tasks(_kernels().backward, arguments, batch * blocks, batch * time * channels * states)
    return ScanGradients(
        u=grad_u.transpose(1, 2),
        delta=grad_delta.transpose(1, 2),
        A=grad_A.sum(0).t(),
        B=grad_B.sum(0).transpose(1, 2),
        C=grad_C.sum(0).transpose(1, 2),
        D=grad_D.sum(0),
        z=grad_z.transpose(1, 2),
        delta_bias=grad_bias.sum(0),
        initial_state=grad_initial,
    )


def step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One token without autograd, in one pass; shapes as in `reference.step`, all in the dtype of the state."""
    zeros = None if D is not None and delta_bias is not None else u.new_zeros(u.shape[1])
    y, new_state = u.new_empty(u.shape), u.new_empty(state.shape)
    tensors = (
        state, u, delta, u if z is None else z, A, B, C,
        zeros if D is None else D, zeros if delta_bias is None else delta_bias,
    )  # fmt: skip
    arrays = [x.detach().contiguous().numpy() for x in tensors]
    _kernels().step(*arrays, delta_softplus, z is not None, y.numpy(), new_state.numpy())
    return y, new_state


def _conv_inputs(*inputs: Tensor) -> list[Tensor]:
    """[B, I, T] with contiguous channels: in place where they are."""
    return [x if x.stride(1) == 1 else x.mT.contiguous().mT for x in inputs]


def _conv_places(inputs: list[Tensor], *more: Tensor | None) -> tuple:
    """Addresses, which cost less to hand over than arrays do: inputs with their strides over batch and time."""
    places = [0 if x is None else x.data_ptr() for x in more]
    tail, weights = places[0], tuple(places[1:])
    return (*((x.data_ptr(), x.stride(0), x.stride(2)) for x in inputs), tail, weights)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, use_silu: bool) -> Tensor:
    batch, channels, time = x.shape
    kernels, y = _conv_kernels(), x.new_empty(batch, time, channels)
    inputs, given = _conv_inputs(x), [None if v is None else v.contiguous() for v in (tail, weight, bias)]
    arguments = (*_conv_places(inputs, *given), tuple(range(weight.shape[1])), y.numpy(), use_silu)
    run_parts(kernels.forward, kernels.forward_region, arguments, x.numel())
    return y.transpose(1, 2)


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, use_silu: bool) -> tuple[Tensor, Tensor]:
    """One token without autograd, x [B, I]: y and the new tail."""
    y, new_tail = x.new_empty(x.shape), x.new_empty(tail.shape)
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    arrays = [v.detach().contiguous().numpy() for v in (x, tail, weight, bias)]
    _conv_kernels().step(*arrays, y.numpy(), new_tail.numpy(), use_silu)
    return y, new_tail


def conv_backward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, grad_y: Tensor, use_silu: bool):
    """Gradients of x, weight, bias (None if absent) and tail."""
    batch, channels, time = x.shape
    kernels, inputs = _conv_kernels(), _conv_inputs(x, grad_y)
    given = [None if v is None else v.contiguous() for v in (tail, weight, bias)]
    grad_x = x.new_empty(batch, time, channels)
    outputs = [grad_x, *(x.new_empty(shape) for shape in (tail.shape, weight.shape, channels))]
    arrays = (v.numpy() for v in outputs)
    arguments = (*_conv_places(inputs, *given), tuple(range(weight.shape[1])), *arrays, use_silu)
    run_parts(kernels.backward, kernels.backward_region, arguments, 2 * x.numel())
    _, grad_tail, grad_weight, grad_bias = outputs
    return grad_x.transpose(1, 2), grad_weight, None if bias is None else grad_bias, grad_tail
