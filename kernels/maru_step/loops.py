"""The block's step for one CPU thread, compiled by numba from the mixer's and the cell's."""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import OPTIONS
from memzoo.kernels.memory_gru.elements import add_matvec
from memzoo.kernels.memory_mingru.loops import step as cell_step
from memzoo.kernels.rms_norm.loops import forward as norm
from memzoo.kernels.selective_scan.mixer_kernel import linear
from memzoo.kernels.selective_scan.mixer_kernel import step as mixer_step


@njit(**OPTIONS)
def step(mixer, cell, others, inputs, outputs, eps, top_k, shared, decay, cap):
    """mixer as `MixerWeights`; cell as `MemoryMinGRUWeights` and the router's bias; others, inputs and outputs in the
    order of the caller."""
    mixer_norm, cell_norm, x_proj, x_bias, out_proj = others
    router_out, router_out_bias, keys, gates_c, bias = cell
    x, conv, ssm, h, banks = inputs
    y, new_conv, new_ssm, new_h, new_banks = outputs
    B, Kr = len(x), len(bias)
    normed, inverse = np.empty_like(x), np.empty(B, x.dtype)
    projected, logits, biases = (
        np.empty((B, 1, len(x_bias)), x.dtype), np.empty((B, 1, Kr), x.dtype), np.empty((B, 1, Kr), x.dtype),
    )  # fmt: skip
    norm(0, 1, x, mixer_norm, eps, normed, inverse)
    mixer_step(mixer, normed, conv, ssm, y, new_conv, new_ssm)
    y += x
    norm(0, 1, y, cell_norm, eps, normed, inverse)
    for b in range(B):
        biases[b, 0] = bias
        linear(projected[b, 0], x_proj, x_bias, normed[b])
    cell_step(
        projected, h, banks, router_out, router_out_bias, keys, gates_c, biases, new_h, logits, new_banks,
        top_k, shared, decay, cap,
    )  # fmt: skip
    for b in range(B):
        add_matvec(y[b], out_proj, new_h[b])
