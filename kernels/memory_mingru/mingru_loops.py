"""minGRU and its gradient for one CPU thread, compiled by numba. A task is one row and one block of channels."""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.memory_gru.elements import sigmoid, tanh

BLOCK = 64


@njit(fastmath=FAST, **OPTIONS)
def forward(gates, h0, mask, out, first, last):
    """gates [B, T, 2H]; h0 [B, H]; mask [B, T] or empty; out [B, T, H]."""
    _, T, H = out.shape
    blocks = (H + BLOCK - 1) // BLOCK
    h, z, n = np.zeros(BLOCK, out.dtype), np.zeros(BLOCK, out.dtype), np.zeros(BLOCK, out.dtype)
    for task in range(first, last):
        b, at = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, H - at)
        h[:width] = h0[b, at : at + width]
        for t in range(T):
            if mask.shape[0] == 0 or mask[b, t]:
                for i in range(width):
                    z[i] = gates[b, t, at + i]
                for i in range(width):
                    n[i] = gates[b, t, H + at + i]
                for i in range(BLOCK):
                    h[i] += sigmoid(z[i]) * (tanh(n[i]) - h[i])
            for i in range(width):
                out[b, t, at + i] = h[i]


@njit(fastmath=FAST, **OPTIONS)
def backward(dout, gates, h0, out, dgates, dh0, mask, first, last):
    """Gradients of gates and h0; out is what forward returned."""
    _, T, H = out.shape
    one = out.dtype.type(1)
    blocks = (H + BLOCK - 1) // BLOCK
    d, h = np.zeros(BLOCK, out.dtype), np.zeros(BLOCK, out.dtype)
    z, n = np.zeros(BLOCK, out.dtype), np.zeros(BLOCK, out.dtype)
    for task in range(first, last):
        b, at = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, H - at)
        d[:] = 0
        for t in range(T - 1, -1, -1):
            for i in range(width):
                d[i] += dout[b, t, at + i]
            if mask.shape[0] > 0 and not mask[b, t]:
                for i in range(width):
                    dgates[b, t, at + i] = 0
                for i in range(width):
                    dgates[b, t, H + at + i] = 0
                continue
            for i in range(width):
                z[i] = gates[b, t, at + i]
            for i in range(width):
                n[i] = gates[b, t, H + at + i]
            for i in range(width):
                h[i] = out[b, t - 1, at + i] if t > 0 else h0[b, at + i]
            for i in range(BLOCK):
                update, candidate = sigmoid(z[i]), tanh(n[i])
                z[i] = d[i] * (candidate - h[i]) * update * (one - update)
                n[i] = d[i] * update * (one - candidate * candidate)
                d[i] *= one - update
            for i in range(width):
                dgates[b, t, at + i] = z[i]
            for i in range(width):
                dgates[b, t, H + at + i] = n[i]
        dh0[b, at : at + width] = d[:width]
