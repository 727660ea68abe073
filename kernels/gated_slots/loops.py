"""Gated slots chunk by chunk, and their gradient, compiled by numba for one CPU thread.

The matrix form of chunked.py (whose letters these are) with everything of a chunk in cache: a task is one bank of one
sequence, its state [S, m] and some arrays [CHUNK, S]. What stands on the right of a product needs contiguous rows,
hence transposed copies (`_t`); S and m are padded with zeros, which change nothing, to what kernels/tiles.py asks for.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.gated_slots.fused import CHUNK, SEGMENT
from memzoo.kernels.gated_slots.reference import MAX_ERASE
from memzoo.kernels.memory_gru.elements import maximum
from memzoo.kernels.selective_scan.elementwise import exp
from memzoo.kernels.tiles import PAD, add_product, product, transpose

# Q, K, w, keep, up = P_{t-1}, down = 1 / P_t, ends = K P_C [CHUNK, S]; value, dy [CHUNK, m]; A [CHUNK, CHUNK]
Chunk = namedtuple("Chunk", "Q K w keep up down ends K_t value dy A")


@njit(**OPTIONS)
def _matrices(like, count, rows, columns):
    """Zeros [count, rows, columns] from a multiple of 64 bytes on, so that no vector straddles two cache lines."""
    size = count * rows * columns
    raw = np.zeros(size + 64 // like.itemsize, like.dtype)
    first = (-raw.ctypes.data % 64) // like.itemsize
    return raw[first : first + size].reshape((count, rows, columns))


@njit(**OPTIONS)
def _sizes(S, m):
    return (S + PAD - 1) // PAD * PAD, (m + PAD - 1) // PAD * PAD


@njit(**OPTIONS)
def _chunk(like, slots, width):
    rows, tokens = _matrices(like, 7, CHUNK, slots), _matrices(like, 2, CHUNK, width)
    return Chunk(
        rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6],
        _matrices(like, 1, slots, CHUNK)[0], tokens[0], tokens[1], _matrices(like, 1, CHUNK, CHUNK)[0],
    )  # fmt: skip


@njit(**OPTIONS)
def _lower(A):
    """tril(A, -1) in place."""
    for i in range(A.shape[0]):
        A[i, i:] = 0


@njit(fastmath=FAST, **OPTIONS)
def _scale_rows(x, factors):
    for s in range(x.shape[0]):
        factor = factors[s]
        for j in range(x.shape[1]):
            x[s, j] *= factor


@njit(fastmath=FAST, **OPTIONS)
def _softmax(out, x):
    top, total = maximum(x), x.dtype.type(0)
    for s in range(x.shape[0]):
        out[s] = exp(x[s] - top)
    for s in range(x.shape[0]):
        total += out[s]
    scale = x.dtype.type(1) / total
    for s in range(x.shape[0]):
        out[s] *= scale


@njit(fastmath=FAST, **OPTIONS)
def _scale_columns(x, factors, out):
    for c in range(x.shape[0]):
        for s in range(x.shape[1]):
            out[c, s] = factors[s] * x[c, s]


@njit(fastmath=FAST, **OPTIONS)
def _prepare(chunk, end, p, router, gate, erase, value, mask, decay, b, k, start, stop):
    """What a chunk needs before it needs the state; `end` becomes P_C [S]. Rows after the last token are zero."""
    S, m = p.shape[4], value.shape[2]
    one = value.dtype.type(1)
    chunk.value[:], end[:] = 0, 1
    if stop - start < CHUNK:
        chunk.Q[:], chunk.K[:] = 0, 0
    for t in range(start, stop):
        c = t - start
        q, key, w, keep, up, down = chunk.Q[c], chunk.K[c], chunk.w[c], chunk.keep[c], chunk.up[c], chunk.down[c]
        rho, alpha, omega = router[b, t, k], p[b, t, 0, k], p[b, t, 1, k]
        for s in range(S):
            up[s] = end[s]
        for s in range(S):
            q[s] = rho * alpha[s] * up[s]
        if mask.shape[0] > 0 and not mask[b, t]:
            key[:], w[:], keep[:] = 0, 0, 1
            for s in range(S):
                down[s] = one / up[s]
            continue
        chunk.value[c, :m] = value[b, t]
        rho_gate, scale = rho * gate[b, t], value.dtype.type(MAX_ERASE) * erase[b, t]
        for s in range(S):
            w[s] = rho_gate * omega[s]
        for s in range(S):
            keep[s] = one - scale * w[s]
            end[s] *= decay * keep[s]
        for s in range(S):
            down[s] = one / end[s]
        for s in range(S):
            key[s] = w[s] * down[s]


@njit(**OPTIONS)
def _advance(chunk, M, end):
    """M = P_C M + (K P_C)' v."""
    _scale_columns(chunk.K, end, chunk.ends)
    _scale_rows(M, end)
    add_product(M, chunk.ends.T, chunk.value)


@njit(**OPTIONS)
def _inner(chunk):
    """A = tril(Q K', -1)."""
    transpose(chunk.K, chunk.K_t)
    product(chunk.A, chunk.Q, chunk.K_t)
    _lower(chunk.A)


@njit(**OPTIONS)
def forward(logits, router, gate, erase, value, mask, decay, p, y, M, starts, first, last):
    """logits [B, T, 2, K, S]; p the addresses out, alike; y [K, B, T, m]; M [B, K, S, m], the state, in place;
    starts [B, K, segments or 0, S, m], the states that a backward starts from."""
    _, T, _, K, S = p.shape
    m = value.shape[2]
    decay = value.dtype.type(decay)
    slots, width = _sizes(S, m)
    chunk, state = _chunk(value, slots, width), _matrices(value, 1, slots, width)[0]
    out, end = _matrices(value, 1, CHUNK, width)[0], _matrices(value, 1, 1, slots)[0, 0]
    for task in range(first, last):
        b, k = task // K, task % K
        state[:S, :m] = M[b, k]
        for start in range(0, T, CHUNK):
            stop = min(start + CHUNK, T)
            if starts.shape[2] > 0 and start % SEGMENT == 0:
                starts[b, k, start // SEGMENT] = state[:S, :m]
            for t in range(start, stop):
                for i in range(2):
                    _softmax(p[b, t, i, k], logits[b, t, i, k])
            _prepare(chunk, end, p, router, gate, erase, value, mask, decay, b, k, start, stop)
            _inner(chunk)
            product(out, chunk.Q, state)
            add_product(out, chunk.A, chunk.value)
            y[k, b, start:stop] = out[: stop - start, :m]
            _advance(chunk, state, end)
        M[b, k] = state[:S, :m]


@njit(fastmath=FAST, **OPTIONS)
def _gradients(chunk, total, dQ, dK, p, router, gate, erase, mask, b, k, start, stop, dp, drouter, dgate, derase):
    """From those of Q and K [CHUNK, S] to those of the inputs. `total` [S], the gradient of log P at the end of the
    chunk, becomes that at its start: q_i has a_1 ... a_{i-1}, k_i the inverses of a_1 ... a_i."""
    S = p.shape[4]
    real = total.dtype.type
    zero, factor = real(0), real(MAX_ERASE)
    for t in range(stop - 1, start - 1, -1):
        c = t - start
        q, key, w, keep, up, down, dq, dk = (
            chunk.Q[c], chunk.K[c], chunk.w[c], chunk.keep[c], chunk.up[c], chunk.down[c], dQ[c], dK[c],
        )  # fmt: skip
        alpha, omega, dread, dwrite = p[b, t, 0, k], p[b, t, 1, k], dp[b, t, 0, k], dp[b, t, 1, k]
        rho, e, d_erase, read_mean, write_mean = router[b, t, k], erase[b, t], zero, zero, zero
        for s in range(S):
            total[s] -= key[s] * dk[s]
        for s in range(S):
            dwrite[s] = -factor * total[s] / keep[s]  # of keep
        for s in range(S):
            d_erase += dwrite[s] * w[s]
        for s in range(S):
            dwrite[s] = dwrite[s] * e + dk[s] * down[s]
        for s in range(S):
            total[s] += q[s] * dq[s]
        for s in range(S):
            dread[s] = dq[s] * up[s]
        for s in range(S):
            read_mean += alpha[s] * dread[s]
            write_mean += omega[s] * dwrite[s]
        written = mask.shape[0] == 0 or mask[b, t]
        g = gate[b, t] if written else zero
        for s in range(S):
            dread[s] = rho * alpha[s] * (dread[s] - read_mean)
        for s in range(S):
            dwrite[s] = rho * g * omega[s] * (dwrite[s] - write_mean)
        drouter[b, t, k] = read_mean + g * write_mean
        dgate[k, b, t] = rho * write_mean if written else zero
        derase[k, b, t] = d_erase


@njit(**OPTIONS)
def backward(
    dy, p, router, gate, erase, value, mask, decay, starts, dp, drouter, dgate, derase, dvalue, dM, first, last
):  # fmt: skip
    """dp: gradient of the logits [B, T, 2, K, S]; drouter [B, T, K]; dgate, derase [K, B, T]; dvalue [K, B, T, m];
    dM [B, K, S, m], the gradient of the state, in place."""
    _, T, _, K, S = p.shape
    m = value.shape[2]
    decay = value.dtype.type(decay)
    slots, width = _sizes(S, m)
    chunk, states = _chunk(value, slots, width), _matrices(value, SEGMENT // CHUNK + 1, slots, width)
    d, dv = _matrices(value, 1, slots, width)[0], _matrices(value, 1, CHUNK, width)[0]
    columns, rows = _matrices(value, 2, slots, CHUNK), _matrices(value, 2, CHUNK, slots)
    tokens, dA = _matrices(value, 2, width, CHUNK), _matrices(value, 2, CHUNK, CHUNK)
    end, total = _matrices(value, 1, 1, slots)[0, 0], np.zeros(slots, value.dtype)
    for task in range(first, last):
        b, k = task // K, task % K
        d[:S, :m] = dM[b, k]
        for segment in range((T - 1) // SEGMENT, -1, -1):
            begin = segment * SEGMENT
            count = (min(SEGMENT, T - begin) + CHUNK - 1) // CHUNK
            states[0, :S, :m] = starts[b, k, segment]
            for i in range(count):
                start = begin + i * CHUNK
                if i + 1 < count or start + CHUNK >= T:  # the last state of all is what `total` starts from
                    stop = min(start + CHUNK, T)
                    _prepare(chunk, end, p, router, gate, erase, value, mask, decay, b, k, start, stop)
                    states[i + 1] = states[i]
                    _advance(chunk, states[i + 1], end)
            if begin + SEGMENT >= T:
                for s in range(slots):
                    total[s] = (d[s] * states[count, s]).sum()
            for i in range(count - 1, -1, -1):
                start = begin + i * CHUNK
                stop = min(start + CHUNK, T)
                _prepare(chunk, end, p, router, gate, erase, value, mask, decay, b, k, start, stop)
                _inner(chunk)
                _scale_columns(chunk.K, end, chunk.ends)
                chunk.dy[:] = 0
                chunk.dy[: stop - start, :m] = dy[b, start:stop]
                transpose(chunk.value, tokens[0])
                transpose(chunk.dy, tokens[1])

                product(dv, chunk.A.T, chunk.dy)
                add_product(dv, chunk.ends, d)
                dvalue[k, b, start:stop] = dv[: stop - start, :m]
                product(dA[0], chunk.dy, tokens[0])  # dy v', and its transpose
                _lower(dA[0])
                transpose(dA[0], dA[1])
                product(columns[0], states[i], tokens[1])
                add_product(columns[0], chunk.K.T, dA[1])  # dQ' = M dy' + K' dA'
                product(columns[1], d, tokens[0])
                _scale_rows(columns[1], end)
                add_product(columns[1], chunk.Q.T, dA[0])  # dK' = P_C d v' + Q' dA
                transpose(columns[0], rows[0])
                transpose(columns[1], rows[1])
                _scale_rows(d, end)
                add_product(d, chunk.Q.T, chunk.dy)
                _gradients(
                    chunk, total, rows[0], rows[1], p, router, gate, erase, mask, b, k, start, stop,
                    dp, drouter, dgate, derase,
                )  # fmt: skip
        dM[b, k] = d[:S, :m]
