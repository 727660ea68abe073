"""Gated slots on the CPU through the numba loops of loops.py. Numba is optional; it compiles at the first call."""

import functools

import torch
from torch import Tensor

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_tasks

CHUNK = 16  # as in chunked.py
SEGMENT = 64  # steps between the states that a forward keeps for its backward

__all__ = ["gated_slots_fused", "is_available"]


@functools.cache
def _loops():
    from memzoo.kernels.gated_slots import loops

    return loops


def _arrays(*tensors: Tensor | None) -> list:
    empty = torch.empty(0, 0, dtype=torch.bool)
    return [(empty if x is None else x.detach().contiguous()).numpy() for x in tensors]


@torch.library.custom_op("memzoo::gated_slots_fused", mutates_args=())
def _forward(
    logits: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    initial_state: Tensor,
    decay: float,
    mask: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, m], the final state, the addresses [B, T, 2, K, S] and, if save, states at chunk starts."""
    B, T, m = value.shape
    K, S = logits.shape[3:]
    p = torch.empty_like(logits, memory_format=torch.contiguous_format)
    state = initial_state.clone(memory_format=torch.contiguous_format)
    y = value.new_empty(K, B, T, m)
    starts = value.new_empty(B, K, -(-T // SEGMENT) if save else 0, S, m)
    inputs = _arrays(logits, router, write_gate, erase, value, mask)
    outputs = [x.numpy() for x in (p, y, state, starts)]
    run_tasks(_loops().forward, (*inputs, decay, *outputs), B * K, B * T * K * S * m)
    return y.sum(0), state, p, starts


@_forward.register_fake
def _(logits, router, write_gate, erase, value, initial_state, decay, mask, save):
    (B, T, m), (K, S) = value.shape, logits.shape[3:]
    segments = -(-T // SEGMENT) if save else 0
    state = initial_state.new_empty(initial_state.shape)
    return value.new_empty(B, T, m), state, logits.new_empty(logits.shape), value.new_empty(B, K, segments, S, m)


@torch.library.custom_op("memzoo::gated_slots_fused_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    p: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    starts: Tensor,
    decay: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the logits, router, write_gate, erase, value and initial_state."""
    B, T, m = value.shape
    K, S = p.shape[3:]
    d_logits, d_router = p.new_empty(p.shape), router.new_empty(router.shape)
    d_gate, d_erase, d_value = p.new_empty(K, B, T), p.new_empty(K, B, T), p.new_empty(K, B, T, m)
    grad_y = value.new_zeros(value.shape) if grad_y is None else grad_y
    d_state = value.new_zeros(B, K, S, m) if grad_state is None else grad_state.clone().contiguous()
    inputs = _arrays(grad_y, p, router, write_gate, erase, value, mask)
    outputs = [x.numpy() for x in (d_logits, d_router, d_gate, d_erase, d_value, d_state)]
    run_tasks(_loops().backward, (*inputs, decay, *_arrays(starts), *outputs), B * K, B * T * K * S * m)
    return d_logits, d_router, d_gate.sum(0), d_erase.sum(0), d_value.sum(0), d_state


@_backward_op.register_fake
def _(grad_y, grad_state, p, router, write_gate, erase, value, starts, decay, mask):
    return tuple(x.new_empty(x.shape) for x in (p, router, write_gate, erase, value, starts[:, :, 0]))


def _save(ctx, inputs, output) -> None:
    _, router, write_gate, erase, value, _, ctx.decay, mask, _ = inputs
    ctx.save_for_backward(output[2], router, write_gate, erase, value, output[3], mask)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y: Tensor | None, grad_state: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, mask = ctx.saved_tensors
    return *_backward_op(grad_y, grad_state, *tensors, ctx.decay, mask), None, None, None


_forward.register_autograd(_backward, setup_context=_save)


def gated_slots_fused(*inputs: Tensor, decay: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the public op, for float32 and float64 CPU tensors; mask is bool."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, state, _, _ = _forward(*inputs, decay, mask, save)
    return y, state
