"""Numba kernels of the selective scan on CPU: the loops of `reference.py`, blocked so that they stay in cache.

A task is one row of the batch and one block of `BLOCK` channels; channels are the vector lanes, so every inner loop
has a constant trip count over local scratch and LLVM vectorises it without runtime checks. Sequences are flat arrays
with their (batch, time) strides in `strides`; channels are contiguous. Time runs in chunks of `chunk` steps, and all
blocks of a chunk before the next one, so that memory is read in order: forward keeps the state at the start of each
chunk, backward recomputes a chunk from there and walks it in reverse.
"""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.selective_scan.elementwise import exp, sigmoid, softplus

BLOCK = 64


@njit(fastmath=FAST, **OPTIONS)
def forward(
    u, delta, z, B, C, strides, A, D, bias, initial, mask, y, final, starts,
    use_softplus, use_z, use_mask, save, chunk, first, last,
):  # fmt: skip
    """A [N, I]; D, bias [I]; initial, final [B, I, N]; mask [B, T]; y [B, T, I]; starts [B, K, N, I]."""
    _, T, I = y.shape
    N = A.shape[0]
    blocks = (I + BLOCK - 1) // BLOCK
    dtype = A.dtype
    zero = dtype.type(0)
    count = last - first
    all_h, all_a = np.zeros((count, N, BLOCK), dtype), np.zeros((count, N, BLOCK), dtype)
    all_skip, all_shift = np.zeros((count, BLOCK), dtype), np.zeros((count, BLOCK), dtype)
    dt, x, out, gate = np.zeros(BLOCK, dtype), np.zeros(BLOCK, dtype), np.zeros(BLOCK, dtype), np.zeros(BLOCK, dtype)
    for task in range(first, last):
        b, i0 = task // blocks, task % blocks * BLOCK
        for i in range(min(BLOCK, I - i0)):
            all_skip[task - first, i], all_shift[task - first, i] = D[i0 + i], bias[i0 + i]
            for n in range(N):
                all_h[task - first, n, i], all_a[task - first, n, i] = initial[b, i0 + i, n], A[n, i0 + i]
    for t0 in range(0, T, chunk):
        for task in range(first, last):
            b, i0, j = task // blocks, task % blocks * BLOCK, task - first
            width = min(BLOCK, I - i0)
            h, a, skip, shift = all_h[j], all_a[j], all_skip[j], all_shift[j]
            if width < BLOCK:  # lanes past the last channel: no leftovers of another block
                for i in range(BLOCK):
                    x[i] = zero
            if save:
                for n in range(N):
                    for i in range(width):
                        starts[b, t0 // chunk, n, i0 + i] = h[n, i]
            for t in range(t0, min(t0 + chunk, T)):
                if use_mask and mask[b, t] == 0:
                    for i in range(width):
                        y[b, t, i0 + i] = 0
                    continue
                at_u, at_delta = b * strides[0, 0] + t * strides[0, 1] + i0, b * strides[1, 0] + t * strides[1, 1] + i0
                for i in range(width):
                    x[i], dt[i] = u[at_u + i], delta[at_delta + i] + shift[i]
                if use_softplus:
                    for i in range(BLOCK):
                        dt[i] = softplus(dt[i])
                for i in range(BLOCK):
                    out[i] = skip[i] * x[i]
                    x[i] *= dt[i]
                at_B, at_C = b * strides[3, 0] + t * strides[3, 1], b * strides[4, 0] + t * strides[4, 1]
                for n in range(N):
                    B_n, C_n = B[at_B + n], C[at_C + n]
                    for i in range(BLOCK):
                        h_n = exp(dt[i] * a[n, i]) * h[n, i] + x[i] * B_n
                        h[n, i] = h_n
                        out[i] += h_n * C_n
                if use_z:
                    at_z = b * strides[2, 0] + t * strides[2, 1] + i0
                    for i in range(width):
                        gate[i] = z[at_z + i]
                    for i in range(BLOCK):
                        out[i] *= gate[i] * sigmoid(gate[i])
                for i in range(width):
                    y[b, t, i0 + i] = out[i]
    for task in range(first, last):
        b, i0 = task // blocks, task % blocks * BLOCK
        for i in range(min(BLOCK, I - i0)):
            for n in range(N):
                final[b, i0 + i, n] = all_h[task - first, n, i]


@njit(fastmath=FAST, **OPTIONS)
def backward(
    u, delta, z, B, C, grad_y, strides, A, D, bias, mask, starts, grad_final,
    grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial,
    use_softplus, use_z, use_mask, chunk, first, last,
):  # fmt: skip
    """grad_u, grad_delta, grad_z [B, T, I]; grad_A [B, N, I], grad_D and grad_bias [B, I] are summed over the batch by
    the caller, grad_B and grad_C [blocks, B, T, N] over the blocks of channels."""
    _, T, I = grad_u.shape
    N = A.shape[0]
    blocks = (I + BLOCK - 1) // BLOCK
    dtype = A.dtype
    zero = dtype.type(0)
    decay, h = np.zeros((chunk, N, BLOCK), dtype), np.zeros((chunk + 1, N, BLOCK), dtype)
    count = last - first
    all_a, all_g, all_A = (
        np.zeros((count, N, BLOCK), dtype), np.zeros((count, N, BLOCK), dtype), np.zeros((count, N, BLOCK), dtype),
    )  # fmt: skip
    all_skip, all_shift = np.zeros((count, BLOCK), dtype), np.zeros((count, BLOCK), dtype)
    all_D, all_bias = np.zeros((count, BLOCK), dtype), np.zeros((count, BLOCK), dtype)
    x, dt, slope = (
        np.zeros((chunk, BLOCK), dtype),
        np.zeros((chunk, BLOCK), dtype),
        np.ones((chunk, BLOCK), dtype),
    )
    ug, gy = np.zeros((chunk, BLOCK), dtype), np.zeros((chunk, BLOCK), dtype)
    out, gate = np.zeros(BLOCK, dtype), np.zeros(BLOCK, dtype)
    gx, gdt = np.zeros(BLOCK, dtype), np.zeros(BLOCK, dtype)
    for task in range(first, last):
        b, i0 = task // blocks, task % blocks * BLOCK
        for i in range(min(BLOCK, I - i0)):
            all_skip[task - first, i], all_shift[task - first, i] = D[i0 + i], bias[i0 + i]
            for n in range(N):
                all_g[task - first, n, i], all_a[task - first, n, i] = grad_final[b, i0 + i, n], A[n, i0 + i]
    for k in range((T - 1) // chunk, -1, -1):
        t0 = k * chunk
        steps = min(chunk, T - t0)
        for task in range(first, last):
            b, block, j = task // blocks, task % blocks, task - first
            i0 = block * BLOCK
            width = min(BLOCK, I - i0)
            a, g, sum_A, sum_D, sum_bias = all_a[j], all_g[j], all_A[j], all_D[j], all_bias[j]
            skip, shift = all_skip[j], all_shift[j]
            if width < BLOCK:  # lanes past the last channel would enter the sums over channels
                for i in range(BLOCK):
                    for n in range(N):
                        h[0, n, i] = zero
                    for s in range(chunk):
                        ug[s, i] = gy[s, i] = zero
            for n in range(N):
                for i in range(width):
                    h[0, n, i] = starts[b, k, n, i0 + i]

            for s in range(steps):  # forward again: h[s] is the state before step t0 + s
                t = t0 + s
                if use_mask and mask[b, t] == 0:
                    for n in range(N):
                        for i in range(BLOCK):
                            h[s + 1, n, i] = h[s, n, i]
                    continue
                at_u, at_delta = b * strides[0, 0] + t * strides[0, 1] + i0, b * strides[1, 0] + t * strides[1, 1] + i0
                at_gy = b * strides[5, 0] + t * strides[5, 1] + i0
                for i in range(width):
                    ug[s, i], dt[s, i], gy[s, i] = u[at_u + i], delta[at_delta + i] + shift[i], grad_y[at_gy + i]
                if use_softplus:
                    for i in range(BLOCK):
                        slope[s, i] = sigmoid(dt[s, i])
                        dt[s, i] = softplus(dt[s, i])
                for i in range(BLOCK):
                    out[i] = skip[i] * ug[s, i]
                    x[s, i] = dt[s, i] * ug[s, i]
                at_B, at_C = b * strides[3, 0] + t * strides[3, 1], b * strides[4, 0] + t * strides[4, 1]
                for n in range(N):
                    B_n, C_n = B[at_B + n], C[at_C + n]
                    for i in range(BLOCK):
                        e = exp(dt[s, i] * a[n, i])
                        h_n = e * h[s, n, i] + x[s, i] * B_n
                        decay[s, n, i], h[s + 1, n, i] = e, h_n
                        out[i] += h_n * C_n
                if use_z:
                    at_z = b * strides[2, 0] + t * strides[2, 1] + i0
                    for i in range(width):
                        gate[i] = z[at_z + i]
                    for i in range(BLOCK):
                        p, v, go = sigmoid(gate[i]), gate[i], gy[s, i]
                        gy[s, i] = go * v * p
                        gate[i] = go * out[i] * (p + v * (p - p * p))
                    for i in range(width):
                        grad_z[b, t, i0 + i] = gate[i]

            for s in range(steps - 1, -1, -1):  # g is dL/dh_t from the future
                t = t0 + s
                if use_mask and mask[b, t] == 0:
                    for i in range(width):
                        grad_u[b, t, i0 + i] = grad_delta[b, t, i0 + i] = 0
                        if use_z:
                            grad_z[b, t, i0 + i] = 0
                    for n in range(N):
                        grad_B[block, b, t, n] = grad_C[block, b, t, n] = 0
                    continue
                at_B, at_C = b * strides[3, 0] + t * strides[3, 1], b * strides[4, 0] + t * strides[4, 1]
                for i in range(BLOCK):
                    gx[i] = gdt[i] = zero
                for n in range(N):
                    B_n, C_n = B[at_B + n], C[at_C + n]
                    sum_B = sum_C = zero
                    for i in range(BLOCK):
                        g_n = g[n, i] + gy[s, i] * C_n
                        sum_C += gy[s, i] * h[s + 1, n, i]
                        sum_B += g_n * x[s, i]
                        gx[i] += g_n * B_n
                        g_n *= decay[s, n, i]
                        g[n, i] = g_n
                        q = g_n * h[s, n, i]  # dL/d(delta_t A)
                        gdt[i] += q * a[n, i]
                        sum_A[n, i] += q * dt[s, i]
                    grad_B[block, b, t, n], grad_C[block, b, t, n] = sum_B, sum_C
                for i in range(BLOCK):
                    gdt[i] = (gdt[i] + gx[i] * ug[s, i]) * slope[s, i]
                    gx[i] = gx[i] * dt[s, i] + gy[s, i] * skip[i]
                    sum_bias[i] += gdt[i]
                    sum_D[i] += gy[s, i] * ug[s, i]
                for i in range(width):
                    grad_u[b, t, i0 + i], grad_delta[b, t, i0 + i] = gx[i], gdt[i]
    for task in range(first, last):
        b, i0, j = task // blocks, task % blocks * BLOCK, task - first
        for i in range(min(BLOCK, I - i0)):
            grad_D[b, i0 + i], grad_bias[b, i0 + i] = all_D[j, i], all_bias[j, i]
            for n in range(N):
                grad_initial[b, i0 + i, n], grad_A[b, n, i0 + i] = all_g[j, n, i], all_A[j, n, i]


@njit(fastmath=FAST, **OPTIONS)
def step(state, u, delta, z, A, B, C, D, bias, use_softplus, use_z, y, new_state):
    """One token: state, new_state [B, I, N]; u, delta, z, y [B, I]; A [I, N]; B, C [B, N]; D, bias [I]."""
    batch, I, N = state.shape
    dt, gate = np.zeros(BLOCK, state.dtype), np.ones(BLOCK, state.dtype)
    for b in range(batch):
        for i0 in range(0, I, BLOCK):
            width = min(BLOCK, I - i0)
            for i in range(width):
                dt[i] = delta[b, i0 + i] + bias[i0 + i]
                if use_z:
                    gate[i] = z[b, i0 + i]
            if use_softplus:
                for i in range(BLOCK):
                    dt[i] = softplus(dt[i])
            if use_z:
                for i in range(BLOCK):
                    gate[i] *= sigmoid(gate[i])
            for i in range(width):
                u_i = u[b, i0 + i]
                x, out = dt[i] * u_i, D[i0 + i] * u_i
                for n in range(N):
                    h = exp(dt[i] * A[i0 + i, n]) * state[b, i0 + i, n] + x * B[b, n]
                    new_state[b, i0 + i, n] = h
                    out += h * C[b, n]
                y[b, i0 + i] = out * gate[i]
