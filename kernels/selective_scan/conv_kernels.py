"""Numba kernels of the causal depthwise convolution on CPU, in the manner of `fused_kernels.py`.

A task is one row of the batch and one block of channels, which are the vector lanes. Time runs in chunks, whose inputs
lie in `rows` behind the W - 1 before them, so that every loop has a constant trip count over local scratch; all blocks
of a chunk come before the next chunk, so that memory is read in order.
"""

import numpy as np
from numba import njit

from memzoo.kernels.selective_scan.common import CHUNK
from memzoo.kernels.selective_scan.elementwise import sigmoid
from memzoo.kernels.selective_scan.fused_kernels import BLOCK, FAST, OPTIONS


@njit(fastmath=FAST, **OPTIONS)
def _before_activation(out, rows, s, taps, shift):
    """out[i] = shift_i + sum_w taps[w, i] rows[s + w, i]."""
    for i in range(BLOCK):
        out[i] = shift[i]
    for w in range(taps.shape[0]):
        for i in range(BLOCK):
            out[i] += taps[w, i] * rows[s + w, i]


@njit(**OPTIONS)
def _load(rows, x, at, stride, tail, b, i0, width, start, stop):
    """Inputs of the steps start..stop of row b into rows; `at` is where the row's step 0 is in the flat x."""
    for t in range(start, stop):
        for i in range(width):
            rows[t - start, i] = x[at + t * stride + i] if t >= 0 else tail[b, i0 + i, t + tail.shape[2]]


@njit(fastmath=FAST, **OPTIONS)
def forward(x, tail, strides, weight, bias, y, use_silu, first, last):
    """x flat; tail [B, I, W - 1]; weight [W, I]; bias [I]; y [B, T, I]."""
    _, T, I = y.shape
    W = weight.shape[0]
    blocks = (I + BLOCK - 1) // BLOCK
    out, shift, taps = np.zeros(BLOCK, y.dtype), np.zeros(BLOCK, y.dtype), np.zeros((W, BLOCK), y.dtype)
    rows = np.zeros((CHUNK + W - 1, BLOCK), y.dtype)
    for start in range(0, T, CHUNK):
        stop = min(start + CHUNK, T)
        for task in range(first, last):
            b, i0 = task // blocks, task % blocks * BLOCK
            width = min(BLOCK, I - i0)
            taps[:, :width], shift[:width] = weight[:, i0 : i0 + width], bias[i0 : i0 + width]
            at = b * strides[0, 0] + i0
            _load(rows, x, at, strides[0, 1], tail, b, i0, width, start - W + 1, stop)
            for t in range(start, stop):
                _before_activation(out, rows, t - start, taps, shift)
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
    out, shift, taps = np.zeros(BLOCK, x.dtype), np.zeros(BLOCK, x.dtype), np.zeros((W, BLOCK), x.dtype)
    count = last - first
    all_taps, all_shift = np.zeros((count, W, BLOCK), x.dtype), np.zeros((count, BLOCK), x.dtype)
    # g: before the activation; the W - 1 rows after a chunk are the first of the next one
    rows, all_g = np.zeros((CHUNK + W - 1, BLOCK), x.dtype), np.zeros((count, CHUNK + W - 1, BLOCK), x.dtype)
    for start in range((T - 1) // CHUNK * CHUNK, -1, -CHUNK):
        steps = min(CHUNK, T - start)
        for task in range(first, last):
            b, i0, j = task // blocks, task % blocks * BLOCK, task - first
            width = min(BLOCK, I - i0)
            at = b * strides[0, 0] + i0
            taps[:, :width], shift[:width] = weight[:, i0 : i0 + width], bias[i0 : i0 + width]
            sum_taps, sum_shift, g = all_taps[j], all_shift[j], all_g[j]
            for w in range(W - 2, -1, -1):
                for i in range(BLOCK):
                    g[steps + w, i] = g[w, i]
            _load(rows, x, at, strides[0, 1], tail, b, i0, width, start - W + 1, start + steps)
            for s in range(steps):
                row = b * strides[1, 0] + (start + s) * strides[1, 1] + i0
                for i in range(width):
                    g[s, i] = grad_y[row + i]
                if use_silu:
                    _before_activation(out, rows, s, taps, shift)
                    for i in range(BLOCK):
                        p = sigmoid(out[i])
                        g[s, i] *= p + out[i] * (p - p * p)
                for i in range(BLOCK):
                    sum_shift[i] += g[s, i]
                for w in range(W):
                    for i in range(BLOCK):
                        sum_taps[w, i] += rows[s + w, i] * g[s, i]
            for s in range(steps):
                for i in range(BLOCK):
                    out[i] = taps[W - 1, i] * g[s, i]
                for w in range(W - 1):
                    for i in range(BLOCK):
                        out[i] += taps[w, i] * g[s + W - 1 - w, i]
                for i in range(width):
                    grad_x[b, start + s, i0 + i] = out[i]
    for task in range(first, last):
        b, i0, j = task // blocks, task % blocks * BLOCK, task - first
        for i in range(min(BLOCK, I - i0)):
            grad_bias[b, i0 + i] = all_shift[j, i]
            for w in range(W):
                grad_weight[b, w, i0 + i] = all_taps[j, w, i]
            for s in range(W - 1):  # the tail's value s met tap w at step s - w
                grad_tail[b, i0 + i, s] = 0
                for w in range(s + 1):
                    grad_tail[b, i0 + i, s] += weight[w, i0 + i] * all_g[j, s - w, i]
