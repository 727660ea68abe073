"""The loops of the norm for one CPU thread, compiled by numba. A task is a contiguous part of the rows."""

import numpy as np
from numba import njit

from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS


@njit(fastmath=FAST, **OPTIONS)
def forward(x, weight, eps, y, inverse, tasks, first, last):
    """x, y [n, D]; weight [D]; inverse [n], 1 / sqrt(mean(x^2) + eps)."""
    n, D = x.shape
    real = x.dtype.type
    for i in range(n * first // tasks, n * last // tasks):
        row, out = x[i], y[i]
        total = real(0)
        for j in range(D):
            total += row[j] * row[j]
        scale = real(1) / np.sqrt(total / real(D) + real(eps))
        inverse[i] = scale
        for j in range(D):
            out[j] = row[j] * scale * weight[j]


@njit(fastmath=FAST, **OPTIONS)
def backward(dy, x, weight, inverse, dx, dweight, tasks, first, last):
    """dweight [tasks, D] is summed over the tasks by the caller."""
    n, D = x.shape
    real = x.dtype.type
    for task in range(first, last):
        sums = dweight[task]
        for i in range(n * task // tasks, n * (task + 1) // tasks):
            row, g, out, scale = x[i], dy[i], dx[i], inverse[i]
            total = real(0)
            for j in range(D):
                total += g[j] * weight[j] * row[j]
            shared = total * scale * scale / real(D)
            for j in range(D):
                out[j] = scale * (g[j] * weight[j] - shared * row[j])
            for j in range(D):
                sums[j] += g[j] * row[j] * scale
