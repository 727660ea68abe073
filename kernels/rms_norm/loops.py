"""The loops of the norm, compiled by numba. A task is a contiguous part of the rows."""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS, UNCOUNTED
from memzoo.kernels.regions import run


@njit(fastmath=FAST, **UNCOUNTED)
def forward(part, parts, x, weight, eps, y, inverse):
    """x, y [n, D]; weight [D]; inverse [n], 1 / sqrt(mean(x^2) + eps)."""
    n, D = x.shape
    real = x.dtype.type
    for i in range(n * part // parts, n * (part + 1) // parts):
        row, out = x[i], y[i]
        total = real(0)
        for j in range(D):
            total += row[j] * row[j]
        scale = real(1) / np.sqrt(total / real(D) + real(eps))
        inverse[i] = scale
        for j in range(D):
            out[j] = row[j] * scale * weight[j]


@njit(fastmath=FAST, **UNCOUNTED)
def backward(part, parts, dy, x, weight, inverse, dx, dweight):
    """dweight [tasks, D] is summed over the tasks by the caller: the number of threads does not change the sum."""
    n, D = x.shape
    real, tasks = x.dtype.type, len(dweight)
    for task in range(tasks * part // parts, tasks * (part + 1) // parts):
        sums = dweight[task]
        sums[:] = 0
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


@njit(**OPTIONS)
def forward_region(threads, arguments):
    run(forward, threads, arguments)


@njit(**OPTIONS)
def backward_region(threads, arguments):
    run(backward, threads, arguments)
