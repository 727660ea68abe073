"""Numba kernels of the causal depthwise convolution on CPU, in the manner of `fused_kernels.py`.

A task is one row of the batch and one block of channels, which are the vector lanes.
"""

import numpy as np
from numba import njit

from memzoo.kernels.selective_scan.elementwise import sigmoid
from memzoo.kernels.selective_scan.fused_kernels import BLOCK, FAST, OPTIONS


@njit(fastmath=FAST, **OPTIONS)
def _before_activation(x, tail, weight, bias, at, stride, b, t, i0, width, out):
    """out[i] = bias_i + sum_w weight[w, i] x_{t - W + 1 + w}; `at` is where row b begins in the flat x."""
    W = weight.shape[0]
    for i in range(width):
        out[i] = bias[i0 + i]
    for w in range(W):
        s = t - W + 1 + w
        if s < 0:
            for i in range(width):
                out[i] += weight[w, i0 + i] * tail[b, i0 + i, s + W - 1]
        else:
            row = at + s * stride + i0
            for i in range(width):
                out[i] += weight[w, i0 + i] * x[row + i]


@njit(fastmath=FAST, **OPTIONS)
def forward(x, tail, strides, weight, bias, y, use_silu, first, last):
    """x flat; tail [B, I, W - 1]; weight [W, I]; bias [I]; y [B, T, I]."""
    _, T, I = y.shape
    blocks = (I + BLOCK - 1) // BLOCK
    out = np.zeros(BLOCK, y.dtype)
    for task in range(first, last):
        b, i0 = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, I - i0)
        for t in range(T):
            _before_activation(x, tail, weight, bias, b * strides[0, 0], strides[0, 1], b, t, i0, width, out)
            if use_silu:
                for i in range(BLOCK):
                    out[i] *= sigmoid(out[i])
            for i in range(width):
                y[b, t, i0 + i] = out[i]


@njit(fastmath=FAST, **OPTIONS)
def step(x, tail, weight, bias, y, new_tail, use_silu):
    """One token: x, y [B, I]; tail, new_tail [B, I, W - 1]; weight [I, W]; bias [I]."""
    batch, I = x.shape
    W = weight.shape[1]
    for b in range(batch):
        for i in range(I):
            out = bias[i] + weight[i, W - 1] * x[b, i]
            for w in range(W - 1):
                out += weight[i, w] * tail[b, i, w]
                new_tail[b, i, w] = tail[b, i, w + 1] if w < W - 2 else x[b, i]
            y[b, i] = out
        if use_silu:
            for i in range(I):
                y[b, i] *= sigmoid(y[b, i])


@njit(fastmath=FAST, **OPTIONS)
def backward(x, grad_y, tail, strides, weight, bias, grad_x, grad_tail, grad_weight, grad_bias, use_silu, first, last):
    """grad_x [B, T, I]; grad_weight [B, W, I] and grad_bias [B, I] are summed over the batch by the caller."""
    _, T, I = grad_x.shape
    W = weight.shape[0]
    blocks = (I + BLOCK - 1) // BLOCK
    out, g = np.zeros(BLOCK, grad_x.dtype), np.zeros(BLOCK, grad_x.dtype)
    for task in range(first, last):
        b, i0 = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, I - i0)
        at = b * strides[0, 0]
        grad_weight[b, :, i0 : i0 + width] = 0
        grad_bias[b, i0 : i0 + width] = 0
        grad_tail[b, i0 : i0 + width] = 0
        for t in range(T):
            row = b * strides[1, 0] + t * strides[1, 1] + i0
            for i in range(width):
                g[i] = grad_y[row + i]
            if use_silu:
                _before_activation(x, tail, weight, bias, at, strides[0, 1], b, t, i0, width, out)
                for i in range(BLOCK):
                    p = sigmoid(out[i])
                    g[i] *= p + out[i] * (p - p * p)
            for i in range(width):
                grad_x[b, t, i0 + i] = 0
                grad_bias[b, i0 + i] += g[i]
            for w in range(W):
                s = t - W + 1 + w
                if s < 0:
                    for i in range(width):
                        grad_tail[b, i0 + i, s + W - 1] += weight[w, i0 + i] * g[i]
                        grad_weight[b, w, i0 + i] += tail[b, i0 + i, s + W - 1] * g[i]
                else:
                    row = at + s * strides[0, 1] + i0
                    for i in range(width):
                        grad_x[b, s, i0 + i] += weight[w, i0 + i] * g[i]
                        grad_weight[b, w, i0 + i] += x[row + i] * g[i]
