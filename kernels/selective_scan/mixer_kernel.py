"""Numba kernel of one token through a whole Mamba mixer on CPU: `mixer.py`."""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.memory_gru.elements import add_matvec
from memzoo.kernels.selective_scan.elementwise import exp, sigmoid, softplus


@njit(**OPTIONS)
def linear(out, weight, bias, x):
    """out = weight x + bias; an empty bias is none."""
    if bias.shape[0] > 0:
        out[:] = bias
    else:
        out[:] = 0
    add_matvec(out, weight, x)


@njit(fastmath=FAST, **OPTIONS)
def step(weights, x, tail, state, y, new_tail, new_state):
    """weights as `MixerWeights`; x, y [B, D]; tail, new_tail [B, I, W - 1]; state, new_state [B, I, N]."""
    in_weight, in_bias, taps, taps_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias = weights
    batch, I, N = state.shape
    W, R = taps.shape[2], dt_weight.shape[1]
    both, u, delta = np.empty(2 * I, x.dtype), np.empty(I, x.dtype), np.empty(I, x.dtype)
    parts, none = np.empty(x_weight.shape[0], x.dtype), np.empty(0, x.dtype)
    for b in range(batch):
        linear(both, in_weight, in_bias, x[b])
        for i in range(I):
            total = taps_bias[i] + taps[i, 0, W - 1] * both[i]
            for w in range(W - 1):
                total += taps[i, 0, w] * tail[b, i, w]
                new_tail[b, i, w] = tail[b, i, w + 1] if w < W - 2 else both[i]
            u[i] = total
        for i in range(I):
            u[i] *= sigmoid(u[i])
        linear(parts, x_weight, none, u)
        linear(delta, dt_weight, dt_bias, parts[:R])
        for i in range(I):
            delta[i] = softplus(delta[i])
        B, C = parts[R : R + N], parts[R + N :]
        for i in range(I):
            step_size, scale, out = delta[i], delta[i] * u[i], D[i] * u[i]
            old, new, log = state[b, i], new_state[b, i], A_log[i]
            for n in range(N):
                h = exp(-step_size * exp(log[n])) * old[n] + scale * B[n]
                new[n] = h
                out += h * C[n]
            u[i] = out
        for i in range(I):
            u[i] *= both[I + i] * sigmoid(both[I + i])
        linear(y[b], out_weight, out_bias, u)
