"""One token of the neural memory as a compiled CPU loop: W and S are read once and written once."""

import numpy as np
from numba import njit

from memzoo.kernels.neural_memory.elements import activate, differentiate
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS


@njit(fastmath=FAST, **OPTIONS)
def _square(x):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return total


@njit(fastmath=FAST, **OPTIONS)
def _apply(matrix, x, out):
    for o in range(matrix.shape[0]):
        total = x.dtype.type(0)
        for i in range(matrix.shape[1]):
            total += matrix[o, i] * x[i]
        out[o] = total


@njit(fastmath=FAST, **OPTIONS)
def _copy(x, scale, out):
    for i in range(x.shape[0]):
        out[i] = scale * x[i]


@njit(fastmath=FAST, **OPTIONS)
def _write(W, S, h, delta, x, keep, eta, step, own_write, W_after, S_after, out):
    """S = eta S - step delta h', W = keep W + S, and out = W x with the new or the old W."""
    for o in range(W.shape[0]):
        total, change = x.dtype.type(0), step * delta[o]
        for i in range(W.shape[1]):
            momentum = eta * S[o, i] - change * h[i]
            weight = keep * W[o, i] + momentum
            S_after[o, i], W_after[o, i] = momentum, weight
            total += (weight if own_write else W[o, i]) * x[i]
        out[o] = total


@njit(fastmath=FAST, **OPTIONS)
def step(q, k, v, gates, mask, W, S, start, rule, y, W_after, S_after, first, last):
    """q, k, v, y [B, H, d]; gates [3, B, H]; mask [B] or empty; tuples of matrices [B, H, out, in] per layer."""
    H, dk, dv, L = q.shape[1], q.shape[2], v.shape[2], len(W)
    wide = max(dk, dv)
    for l in range(L):
        wide = max(wide, W[l].shape[2])
    h, delta = np.empty((L + 1, wide), q.dtype), np.empty((L, wide), q.dtype)
    hidden = np.empty((3, L, 1, wide), q.dtype)
    z, slope, bend = hidden[0], hidden[1], hidden[2]
    x, out = np.empty((1, wide), q.dtype), np.empty((1, wide), q.dtype)
    one, least = q.dtype.type(1), q.dtype.type(1e-12)
    for task in range(first, last):
        b, head = task // H, task % H
        if mask.shape[0] > 0 and not mask[b]:
            y[b, head] = 0
            for l in range(L):
                W_after[l][b, head], S_after[l][b, head] = W[l][b, head], S[l][b, head]
            continue
        query, key, value = q[b, head], k[b, head], v[b, head]
        _copy(query, one / max(np.sqrt(_square(query)), least) if rule.normalize else one, x[0])
        _copy(key, one / max(np.sqrt(_square(key)), least) if rule.normalize else one, h[0])
        for i in range(dv):
            y[b, head, i] = x[0, i] if rule.residual else q.dtype.type(0)
        for l in range(L):
            matrix = start[l][b, head]
            d = matrix.shape[0]
            _apply(matrix, h[l], z[l, 0])
            if l < L - 1:
                differentiate(rule.kind, z[l, :, :d], h[l + 1 : l + 2], slope[l], bend[l])
        error = delta[L - 1, :dv]
        for i in range(dv):
            error[i] = z[L - 1, 0, i] - value[i] + (h[0, i] if rule.residual else q.dtype.type(0))
        for l in range(L - 1, 0, -1):
            matrix = start[l][b, head]
            d = matrix.shape[1]
            delta[l - 1, :d] = 0
            for o in range(matrix.shape[0]):
                for i in range(d):
                    delta[l - 1, i] += delta[l, o] * matrix[o, i]
            for i in range(d):
                delta[l - 1, i] *= slope[l - 1, 0, i]
        size = gates[2, b, head]
        if rule.clip > 0:
            square = q.dtype.type(0)
            for l in range(L):
                out_width, width = start[l].shape[2:]
                square += _square(delta[l, :out_width]) * _square(h[l, :width])
            if square > rule.clip * rule.clip:
                size *= rule.clip / np.sqrt(square)
        if rule.threshold > 0 and _square(error) < rule.threshold:
            size = q.dtype.type(0)
        keep, eta = gates[0, b, head], gates[1, b, head]
        for l in range(L):
            _write(
                W[l][b, head], S[l][b, head], h[l], delta[l], x[0], keep, eta, size, rule.own_write,
                W_after[l][b, head], S_after[l][b, head], out[0],
            )  # fmt: skip
            if l < L - 1:
                activate(rule.kind, out[:, : W[l].shape[2]], x)
        for i in range(dv):
            y[b, head, i] += out[0, i]
