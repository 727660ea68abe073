"""Selective scan as a plain loop over time: the definition that every other implementation is tested against.

Mamba (arXiv 2312.00752), equations 2a-2b with the discretisation of section 3.6 (zero-order hold for A, Euler for B):

    delta_t = softplus(delta_t + delta_bias)
    h_t = exp(delta_t A) * h_{t-1} + delta_t B_t u_t          [B, I, N]
    y_t = (C_t . h_t + D u_t) * silu(z_t)                     [B, I]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.selective_scan.common import ScanInputs, softplus


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
    """One time step: u, delta, z [B, I]; B, C [B, N]; state [B, I, N]. Returns y [B, I] and the new state."""
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = softplus(delta)
    decay = torch.exp(delta[:, :, None] * A)  # [B, I, N]
    state = decay * state + (delta * u)[:, :, None] * B[:, None, :]
    y = (state * C[:, None, :]).sum(-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, state


def selective_scan_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Returns y [B, I, T] in u's dtype and the final state [B, I, N]. Differentiable by autograd."""
    output_dtype = inputs.u.dtype
    u, delta, A, B, C, D, z, delta_bias, state, mask, delta_softplus = inputs.in_compute_dtype()
    if state is None:
        state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        gate = None if z is None else z[:, :, t]
        y, new_state = step(
            state, u[:, :, t], delta[:, :, t], A, B[:, :, t], C[:, :, t], D, gate, delta_bias, delta_softplus
        )
        if mask is not None:
            real = mask[:, t]
            y = torch.where(real[:, None], y, 0.0)
            new_state = torch.where(real[:, None, None], new_state, state)
        outputs.append(y)
        state = new_state
    return torch.stack(outputs, dim=-1).to(output_dtype), state
