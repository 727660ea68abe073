"""Numba kernels of the causal depthwise convolution on CPU.

A part is a range of channels, which are the vector lanes, in all rows of the batch. Time runs in chunks, whose inputs
lie in `rows` [W - 1 + CHUNK, channels] behind the W - 1 before them. `lags` is a tuple of W numbers: so numba knows W
when it compiles, and an output's products are summed in registers.
"""

import numpy as np
from numba import njit

from memzoo.kernels.addresses import flat
from memzoo.kernels.compiled import FAST, OPTIONS, UNCOUNTED
from memzoo.kernels.regions import run
from memzoo.kernels.selective_scan.common import CHUNK
from memzoo.kernels.selective_scan.elementwise import sigmoid

STEPS = 4  # that a sum over time adds at once
LINE = 16  # channels: parts begin at multiples


@njit(**UNCOUNTED)
def _channels(part, parts, I):
    """A part's first channel and the one after its last."""
    lines = (I + LINE - 1) // LINE
    return lines * part // parts * LINE, min(lines * (part + 1) // parts * LINE, I)


@njit(**UNCOUNTED)
def _carry(rows, W):
    """The last W - 1 rows of a chunk come before the next one's."""
    for w in range(W - 1):
        old, new = rows[w], rows[CHUNK + w]
        for i in range(rows.shape[1]):
            old[i] = new[i]


@njit(**UNCOUNTED)
def _load(rows, x, at, stride, first, count):
    """rows[first : first + count] from the flat x, which has a row every `stride` from `at` on; zeros behind them."""
    for s in range(count):
        row, values = rows[first + s], x[at + s * stride : at + s * stride + rows.shape[1]]
        for i in range(len(row)):
            row[i] = values[i]
    rows[first + count :] = 0


@njit(**UNCOUNTED)
def _load_tail(rows, tail, b, i0, I, W):
    """The rows before sequence b from tail [B, I, W - 1], flat."""
    for w in range(W - 1):
        for i in range(rows.shape[1]):
            rows[w, i] = tail[(b * I + i0 + i) * (W - 1) + w]


@njit(**OPTIONS)
def _weights(places, i0, i1, lags, like):
    """A part's taps [W, channels] and bias from the addresses of [I, W] and [I], 0 for no bias."""
    W = len(lags)
    taps, shift = np.empty((W, i1 - i0), like.dtype), np.zeros(i1 - i0, like.dtype)
    weight, bias = flat(places[0], like.dtype.type(0)), flat(places[1], like.dtype.type(0))
    for i in range(i0, i1):
        for w in range(W):
            taps[w, i - i0] = weight[i * W + w]
        if places[1] != 0:
            shift[i - i0] = bias[i]
    return taps, shift


@njit(fastmath=FAST, **UNCOUNTED)
def _before_activation(rows, s, i, lags, taps, shift):
    """shift_i + sum_w taps[w, i] rows[s + w, i]."""
    value = shift[i]
    for w in range(len(lags)):
        value += taps[w, i] * rows[s + w, i]
    return value


@njit(fastmath=FAST, **UNCOUNTED)
def _convolve(out, rows, s, lags, taps, shift, use_silu):
    for i in range(len(out)):
        value = _before_activation(rows, s, i, lags, taps, shift)
        out[i] = value * sigmoid(value) if use_silu else value


@njit(fastmath=FAST, **UNCOUNTED)
def _multiply_slope(g, rows, s, lags, taps, shift):
    """g *= silu'(what is before the activation)."""
    for i in range(len(g)):
        value = _before_activation(rows, s, i, lags, taps, shift)
        p = sigmoid(value)
        g[i] *= p + value * (p - p * p)


@njit(fastmath=FAST, **UNCOUNTED)
def _correlate(out, g, s, lags, taps):
    """out = sum_w taps[w] g[s - w]: what an input met."""
    for i in range(len(out)):
        value = taps[0, i] * g[s, i]
        for w in range(1, len(lags)):
            value += taps[w, i] * g[s - w, i]
        out[i] = value


@njit(fastmath=FAST, **UNCOUNTED)
def _add_products(total, rows, r, g, s):
    """total += rows[r] g[s] for STEPS rows of both."""
    for i in range(len(total)):
        value = total[i]
        for step in range(STEPS):
            value += rows[r + step, i] * g[s + step, i]
        total[i] = value


@njit(fastmath=FAST, **UNCOUNTED)
def _add_rows(total, g, s):
    for i in range(len(total)):
        value = total[i]
        for step in range(STEPS):
            value += g[s + step, i]
        total[i] = value


@njit(**OPTIONS)
def forward(part, parts, x, tail, weights, lags, y, use_silu):
    """x: address and strides over batch and time, of contiguous channels; tail: address of [B, I, W - 1]; weights: as
    in `_weights`; y [B, T, I]."""
    B, T, I = y.shape
    (at, per_row, per_step), zero, W = x, y.dtype.type(0), len(lags)
    inputs, old = flat(at, zero), flat(tail, zero)
    i0, i1 = _channels(part, parts, I)
    taps, shift = _weights(weights, i0, i1, lags, y)
    rows = np.empty((W - 1 + CHUNK, i1 - i0), y.dtype)
    for b in range(B):
        _load_tail(rows, old, b, i0, I, W)
        for start in range(0, T, CHUNK):
            count = min(CHUNK, T - start)
            _load(rows, inputs, b * per_row + start * per_step + i0, per_step, W - 1, count)
            for s in range(count):
                _convolve(y[b, start + s, i0:i1], rows, s, lags, taps, shift, use_silu)
            _carry(rows, W)


@njit(**OPTIONS)
def backward(part, parts, x, grad_y, tail, weights, lags, grad_x, grad_tail, grad_weight, grad_bias, use_silu):
    """x, tail and weights as in `forward`, grad_y as x; grad_x [B, T, I], grad_tail [B, I, W - 1], grad_weight [I, W],
    grad_bias [I]."""
    B, T, I = grad_x.shape
    (at, per_row, per_step), (grad_at, grad_per_row, grad_per_step) = x, grad_y
    zero, W = grad_x.dtype.type(0), len(lags)
    inputs, grads, old = flat(at, zero), flat(grad_at, zero), flat(tail, zero)
    i0, i1 = _channels(part, parts, I)
    taps, shift = _weights(weights, i0, i1, lags, grad_x)
    rows = np.empty((W - 1 + CHUNK, i1 - i0), grad_x.dtype)
    g = np.empty_like(rows)  # gradients before the activation
    out, sum_taps, sum_shift = np.empty_like(shift), np.zeros_like(taps), np.zeros_like(shift)
    for b in range(B):
        _load_tail(rows, old, b, i0, I, W)
        g[: W - 1] = 0
        for start in range(0, T + W - 1, CHUNK):  # the last inputs meet nothing but zeros beyond the end
            count = max(min(CHUNK, T - start), 0)
            _load(rows, inputs, b * per_row + start * per_step + i0, per_step, W - 1, count)
            _load(g, grads, b * grad_per_row + start * grad_per_step + i0, grad_per_step, W - 1, count)
            for s in range(count if use_silu else 0):
                _multiply_slope(g[W - 1 + s], rows, s, lags, taps, shift)
            for s in range(0, count, STEPS):
                _add_rows(sum_shift, g, W - 1 + s)
                for w in range(W):
                    _add_products(sum_taps[w], rows, s + w, g, W - 1 + s)
            for s in range(min(CHUNK, T + W - 1 - start)):
                t = start + s - (W - 1)
                _correlate(out if t < 0 else grad_x[b, t, i0:i1], g, W - 1 + s, lags, taps)
                for i in range(len(out) if t < 0 else 0):
                    grad_tail[b, i0 + i, start + s] = out[i]
            _carry(rows, W)
            _carry(g, W)
    grad_weight[i0:i1], grad_bias[i0:i1] = sum_taps.T, sum_shift


@njit(**OPTIONS)
def forward_region(threads, arguments):
    run(forward, threads, arguments)


@njit(**OPTIONS)
def backward_region(threads, arguments):
    run(backward, threads, arguments)


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
