"""The linear recurrence as one compiled loop for one CPU thread; 64 channels at a time are the vector lanes."""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS

BLOCK = 64


@njit(fastmath=FAST, **OPTIONS)
def run(a, b, h0, reverse, out, first, last):
    """a, b, out [B, T, H]; h0 [B, H]; a task is one row of the batch and one block of channels."""
    _, T, H = b.shape
    blocks = (H + BLOCK - 1) // BLOCK
    h = np.empty(BLOCK, b.dtype)
    for task in range(first, last):
        row, at = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, H - at)
        for i in range(width):
            h[i] = h0[row, at + i]
        for step in range(T):
            t = T - 1 - step if reverse else step
            for i in range(width):
                h[i] = a[row, t, at + i] * h[i] + b[row, t, at + i]
            for i in range(width):
                out[row, t, at + i] = h[i]
