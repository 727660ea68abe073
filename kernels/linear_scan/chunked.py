"""The linear recurrence: a compiled loop on the CPU where numba is installed (loops.py), two levels elsewhere.

Two levels take about 2 sqrt(T) steps instead of T, and no division or logarithm. Time is cut into n chunks of C. All
chunks run side by side from a zero state (C steps), their ends are chained (n steps), and every chunk adds what its
start contributes: h = h_local + (product of a) * h_start.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_tasks


@torch.library.custom_op("memzoo::linear_scan", mutates_args=())
def scan(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, or h_t = a_t h_{t+1} + b_t when reversed; a, b [B, T, H], initial_state [B, H]."""
    if b.device.type == "cpu" and is_available():
        return _compiled(a, b, initial_state, reverse)
    return two_levels(a.flip(1), b.flip(1), initial_state).flip(1) if reverse else two_levels(a, b, initial_state)


def _compiled(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    from memzoo.kernels.linear_scan.loops import BLOCK, run

    h = b.new_empty(b.shape)
    inputs = [x.detach().contiguous().numpy() for x in (a, b, initial_state)]
    run_tasks(run, (*inputs, reverse, h.numpy()), len(b) * -(-b.shape[2] // BLOCK), b.numel())
    return h


def two_levels(a: Tensor, b: Tensor, initial_state: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t with torch operators, on any device."""
    B, T, H = b.shape
    C = max(1, math.isqrt(T))
    n = -(-T // C)
    pad = (0, 0, 0, n * C - T)
    # [C, B, n, H]: one step of all chunks is one contiguous slice
    a = F.pad(a, pad, value=1.0).view(B, n, C, H).permute(2, 0, 1, 3).contiguous()
    h = F.pad(b, pad).view(B, n, C, H).permute(2, 0, 1, 3).contiguous()
    for j in range(1, C):
        h[j].addcmul_(a[j], h[j - 1])
        a[j].mul_(a[j - 1])  # a becomes the product from the chunk's start
    starts = torch.empty_like(h[0])  # [B, n, H]
    state = initial_state
    for i in range(n):
        starts[:, i] = state
        state = torch.addcmul(h[-1, :, i], a[-1, :, i], state)
    h.addcmul_(a, starts)
    return h.permute(1, 2, 0, 3).reshape(B, n * C, H)[:, :T].contiguous()


@scan.register_fake
def _(a: Tensor, b: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    a, _, initial_state, reverse = inputs
    ctx.save_for_backward(a, initial_state, output)
    ctx.reverse = reverse


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    a, initial_state, h = ctx.saved_tensors
    if ctx.reverse:
        a, h, grad = a.flip(1), h.flip(1), grad.flip(1)
    # g_t = grad_t + a_{t+1} g_{t+1}: the same recurrence, backwards in time
    g = scan(F.pad(a[:, 1:], (0, 0, 0, 1)), grad.contiguous(), torch.zeros_like(initial_state), True)
    before = torch.cat([initial_state[:, None], h[:, :-1]], dim=1)
    grad_a, grad_b, grad_state = g * before, g, g[:, 0] * a[:, 0]
    if ctx.reverse:
        grad_a, grad_b = grad_a.flip(1), grad_b.flip(1)
    return grad_a, grad_b, grad_state, None


scan.register_autograd(_backward, setup_context=_save)
