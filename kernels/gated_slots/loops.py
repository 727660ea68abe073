"""The recurrence of gated slots and its gradient, token after token, compiled by numba for one CPU thread.

One task is one bank of one sequence: its state, S m numbers, stays in the innermost cache, and a token is one pass
over it. That beats the matrix form (chunked.py), whose states per chunk do not fit.
"""

import numpy as np
from numba import njit

from memzoo.kernels.gated_slots.fused import CHUNK
from memzoo.kernels.gated_slots.reference import MAX_ERASE
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS


@njit(fastmath=FAST, **OPTIONS)
def _write(M, w, keep, value):
    for s in range(M.shape[0]):
        for j in range(M.shape[1]):
            M[s, j] = keep[s] * M[s, j] + w[s] * value[j]


@njit(fastmath=FAST, **OPTIONS)
def _gates(w, keep, omega, rho_gate, erase, decay):
    """w = rho gate omega, keep = decay (1 - MAX_ERASE w erase), over the S slots."""
    one, scale = w.dtype.type(1), w.dtype.type(MAX_ERASE) * erase
    for s in range(w.shape[0]):
        w[s] = rho_gate * omega[s]
        keep[s] = decay * (one - scale * w[s])


@njit(fastmath=FAST, **OPTIONS)
def forward(p, router, gate, erase, value, mask, decay, y, M, starts, first, last):
    """p [B, T, 2, K, S]; y [K, B, T, m]; M [B, K, S, m], the state, in place; starts [B, K, chunks or 0, S, m]."""
    _, T, _, K, S = p.shape
    m = value.shape[2]
    decay = p.dtype.type(decay)
    w, keep = np.empty(S, p.dtype), np.empty(S, p.dtype)
    for task in range(first, last):
        b, k = task // K, task % K
        state = M[b, k]
        for t in range(T):
            if starts.shape[2] > 0 and t % CHUNK == 0:
                starts[b, k, t // CHUNK] = state
            rho, out, v, alpha = router[b, t, k], y[k, b, t], value[b, t], p[b, t, 0, k]
            out[:] = 0
            if mask.shape[0] > 0 and not mask[b, t]:
                for s in range(S):
                    for j in range(m):
                        out[j] += rho * alpha[s] * state[s, j]
                continue
            _gates(w, keep, p[b, t, 1, k], rho * gate[b, t], erase[b, t], decay)
            for s in range(S):
                read, w_s, keep_s = rho * alpha[s], w[s], keep[s]
                for j in range(m):
                    out[j] += read * state[s, j]
                    state[s, j] = keep_s * state[s, j] + w_s * v[j]


@njit(fastmath=FAST, **OPTIONS)
def backward(
    dy, p, router, gate, erase, value, mask, decay, starts, dp, drouter, dgate, derase, dvalue, dM, first, last
):  # fmt: skip
    """dp: gradient of the logits [B, T, 2, K, S]; drouter [B, T, K]; dgate, derase [K, B, T]; dvalue [K, B, T, m];
    dM [B, K, S, m], the gradient of the state, in place."""
    _, T, _, K, S = p.shape
    m = value.shape[2]
    real = p.dtype.type
    decay = real(decay)
    zero, scale = real(0), decay * real(MAX_ERASE)
    w, keep, dread, dwrite = np.empty(S, p.dtype), np.empty(S, p.dtype), np.empty(S, p.dtype), np.empty(S, p.dtype)
    states = np.empty((CHUNK, S, m), p.dtype)
    for task in range(first, last):
        b, k = task // K, task % K
        d = dM[b, k]
        for start in range((T - 1) // CHUNK * CHUNK, -1, -CHUNK):
            stop = min(start + CHUNK, T)
            states[0] = starts[b, k, start // CHUNK]
            for t in range(start, stop - 1):
                states[t - start + 1] = states[t - start]
                if mask.shape[0] == 0 or mask[b, t]:
                    _gates(w, keep, p[b, t, 1, k], router[b, t, k] * gate[b, t], erase[b, t], decay)
                    _write(states[t - start + 1], w, keep, value[b, t])
            for t in range(stop - 1, start - 1, -1):
                state, v, g, dv = states[t - start], value[b, t], dy[b, t], dvalue[k, b, t]
                rho, alpha, omega = router[b, t, k], p[b, t, 0, k], p[b, t, 1, k]
                written = mask.shape[0] == 0 or mask[b, t]
                e = erase[b, t] if written else zero
                if written:
                    _gates(w, keep, omega, rho * gate[b, t], e, decay)
                else:
                    w[:] = 0
                    keep[:] = 1
                dv[:] = 0
                read_mean, write_mean, d_erase = zero, zero, zero
                for s in range(S):
                    read, w_s, keep_s = rho * alpha[s], w[s], keep[s]
                    dr, dk, dw = zero, zero, zero
                    for j in range(m):
                        dr += g[j] * state[s, j]
                        dk += d[s, j] * state[s, j]
                        dw += d[s, j] * v[j]
                        dv[j] += w_s * d[s, j]
                        d[s, j] = keep_s * d[s, j] + read * g[j]
                    dread[s] = dr
                    dwrite[s] = dw - scale * e * dk
                    d_erase -= scale * w_s * dk
                    read_mean += alpha[s] * dr
                    write_mean += omega[s] * dwrite[s]
                rho_gate = rho * gate[b, t] if written else zero
                for s in range(S):
                    dp[b, t, 0, k, s] = rho * alpha[s] * (dread[s] - read_mean)
                    dp[b, t, 1, k, s] = rho_gate * omega[s] * (dwrite[s] - write_mean)
                drouter[b, t, k] = read_mean + (gate[b, t] * write_mean if written else zero)
                dgate[k, b, t] = rho * write_mean if written else zero
                derase[k, b, t] = d_erase
