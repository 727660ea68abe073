"""Selective state-space scan, single-step update and causal convolution (Mamba, arXiv 2312.00752, section 3).

`selective_scan` is the definition in `reference.py`, computed by whichever form fits the device:
`fused` (CPU, when Numba is installed), `triton` (CUDA), `chunked` (torch operators, everywhere else).
"""

import os
from typing import Literal

import torch
from torch import Tensor

from memzoo.kernels.available import has_triton
from memzoo.kernels.selective_scan import fused, reference
from memzoo.kernels.selective_scan.common import ScanInputs, check_inputs, compute_dtype
from memzoo.kernels.selective_scan.conv import causal_conv1d, causal_conv1d_update
from memzoo.kernels.selective_scan.operators import scan_op
from memzoo.kernels.selective_scan.update import selective_scan_update, single_step

__all__ = ["causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_scan_update"]

Implementation = Literal["auto", "reference", "chunked", "fused", "triton"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Mamba (arXiv 2312.00752), equation 2, with input-dependent delta, B and C (algorithm 2):

        h_t = exp(delta_t A) * h_{t-1} + delta_t B_t u_t,   y_t = (C_t . h_t + D u_t) * silu(z_t)

    Shapes: u, delta, z [batch, channels, time], any strides, fastest with contiguous channels; A [channels, states];
    B, C [batch, states, time]; D, delta_bias [channels]; initial_state [batch, channels, states];
    mask [batch, time], 0 at pads, wherever they are: a pad leaves the state exactly as it was and its y is 0.

    Returns y [batch, channels, time] in u's dtype and the final state, float32 (float64 for float64 inputs).
    Differentiable once in every tensor but the mask. Raises ValueError for a wrong shape or time = 0.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus)
    check_inputs(inputs)
    if implementation == "auto" and u.shape[2] == 1:
        return _single_step(inputs)
    implementation = _choose(implementation, u.device.type)
    if implementation == "reference":
        return reference.selective_scan_reference(inputs)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:9])
    y, final_state, _ = scan_op(*inputs, implementation, save)
    return y, final_state


def _single_step(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, z, delta_bias, state, mask, delta_softplus = inputs
    if state is None:
        state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1], dtype=compute_dtype(u))
    gate = None if z is None else z[:, :, 0]
    y, new_state = single_step(
        state, u[:, :, 0], delta[:, :, 0], A, B[:, :, 0], C[:, :, 0], D, gate, delta_bias, delta_softplus
    )
    if mask is not None:
        real = mask.bool()  # [B, 1]
        y = torch.where(real, y, 0.0)
        new_state = torch.where(real[:, :, None], new_state, state.to(new_state.dtype))
    return y.unsqueeze(-1), new_state


def _choose(implementation: str, device: str) -> str:
    if implementation == "auto":
        if device == "cuda":
            return "triton" if has_triton("selective_scan") else "chunked"
        return "fused" if device == "cpu" and fused.is_available() else "chunked"
    if implementation not in ("reference", "chunked", "fused", "triton"):
        raise ValueError(f"implementation must be auto, reference, chunked, fused or triton, got {implementation!r}")
    if implementation == "fused" and (device != "cpu" or not fused.is_available()):
        raise ValueError("implementation='fused' needs CPU tensors and Numba (pip install numba)")
    if implementation == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("implementation='triton' needs CUDA tensors (or TRITON_INTERPRET=1)")
    return implementation
