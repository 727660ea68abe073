"""The loops of `gated_norm.py`; a task is one block of rows, d contiguous numbers each."""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.neural_memory.gated_norm import TASKS
from memzoo.kernels.selective_scan.elementwise import sigmoid


@njit(fastmath=FAST, **OPTIONS)
def _scale(row, eps):
    """1 / sqrt(mean(row^2) + eps)."""
    square = row.dtype.type(0)
    for i in range(row.shape[0]):
        square += row[i] * row[i]
    return row.dtype.type(1) / np.sqrt(square / row.dtype.type(row.shape[0]) + row.dtype.type(eps))


@njit(fastmath=FAST, **OPTIONS)
def forward(x, weight, gate, eps, out, first, last):
    rows = x.shape[0]
    for r in range(rows * first // TASKS, rows * last // TASKS):
        row, z, to = x[r], gate[r], out[r]
        scale = _scale(row, eps)
        for i in range(len(weight)):
            to[i] = scale * row[i] * weight[i] * sigmoid(z[i])


@njit(fastmath=FAST, **OPTIONS)
def backward(d_out, x, weight, gate, eps, d_x, d_gate, d_weight, first, last):
    """d_weight [TASKS, d]."""
    rows, d = x.shape[0], len(weight)
    one, normal, direct = x.dtype.type(1), np.empty(d, x.dtype), np.empty(d, x.dtype)
    for task in range(first, last):
        d_w = d_weight[task]
        d_w[:] = 0
        for r in range(rows * task // TASKS, rows * (task + 1) // TASKS):
            row, z, g = x[r], gate[r], d_out[r]
            scale, along = _scale(row, eps), x.dtype.type(0)
            for i in range(d):
                s = sigmoid(z[i])
                normal[i] = scale * row[i]
                direct[i] = g[i] * s
                d_gate[r, i] = g[i] * weight[i] * normal[i] * s * (one - s)
            for i in range(d):
                d_w[i] += direct[i] * normal[i]
                direct[i] *= weight[i]
                along += direct[i] * normal[i]
            along /= x.dtype.type(d)
            for i in range(d):
                d_x[r, i] = scale * (direct[i] - along * normal[i])
