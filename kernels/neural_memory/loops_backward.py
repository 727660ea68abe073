"""The backward of `loops.py`: segments of chunks from the last to the first, each replayed from its first state.

Names as there and in `backward.py`; d_ before a name is the gradient of the outer loss.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.neural_memory.elements import activate_with_slope, differentiate, multiply, scale_columns
from memzoo.kernels.neural_memory.loops import (
    advance,
    aligned,
    blocks_of,
    clip_scales,
    complete,
    decay,
    decays_of,
    expect,
    flush,
    gather,
    large_enough,
    load_state,
    normalize,
    real_tokens,
    scatter,
    squared_gradients,
    states_of,
    store_state,
)
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS
from memzoo.kernels.tiles import add_product, mix_add, product, scale_add, transpose

# Gradients of a segment's h and delta [slots, L, P, block] and of the gates [slots, block].
Grads = namedtuple("Grads", "h delta keep eta w")
# Gradients of a block's decays: of a, b, e, P and E after i tokens.
DecayGrads = namedtuple("DecayGrads", "a b e P E")
Scratch = namedtuple("Scratch", "x rows slope d_r W S both attention")


@njit(**OPTIONS)
def grads_of(like, rule, count):
    L, P, n = len(rule.widths) - 1, rule.pads.max(), rule.block
    parts = aligned(like, 2 * count * L * P, n).reshape((2, count, L, P, n))
    gates = np.zeros((3, count, n), like.dtype)
    return Grads(parts[0], parts[1], gates[0], gates[1], gates[2])


@njit(**OPTIONS)
def scratch_of(like, rule):
    P, n = rule.pads.max(), rule.block
    wide = aligned(like, 5 * P, n).reshape((5, P, n))
    return Scratch(
        wide[0], aligned(like, n, P).reshape((n, P)), wide[1], wide[2], wide[3], wide[4], wide[3:],
        aligned(like, 4 * n, n).reshape((4, n, n)),
    )  # fmt: skip


@njit(fastmath=FAST, **OPTIONS)
def recall(block, s, kept, rule):
    """Fill a block from what the forward kept; h_0 is there."""
    last, at, n = len(rule.widths) - 2, 0, kept.shape[1]
    for l in range(last):
        d = rule.widths[l + 1]
        z, g, bend = kept[at : at + d], kept[at + d : at + 2 * d], block.bend[s, l]
        differentiate(rule.kind, z, block.h[s, l + 1], block.slope[s, l], bend)
        multiply(g, block.slope[s, l], block.delta[s, l])
        multiply(g, bend, bend)
        at += 3 * d
    for f in range(rule.widths[last + 1]):
        for t in range(n):
            block.delta[s, last, f, t] = kept[at + f, t]


@njit(fastmath=FAST, **OPTIONS)
def update_backward(state, d_state, s, block, n, d, grads, d_d, scratch, rule):
    """Gradients that go through a block's update, but for its state's."""
    for l in range(len(rule.widths) - 1):
        width, out = rule.pads[l], rule.pads[l + 1]
        h, delta, d_delta, d_h = (
            block.h[s, l, :width],
            block.delta[s, l, :out],
            grads.delta[s, l],
            grads.h[s, l, :width],
        )
        product(scratch.W[:out], d_state[l, 0, :out, :width], h)
        product(scratch.S[:out], d_state[l, 1, :out, :width], h)
        to_W, to_S = scratch.attention[0, 0], scratch.attention[0, 1]
        to_W[:] = 0
        to_S[:] = 0
        for o in range(out):
            for t in range(rule.block):
                W, S = scratch.W[o, t], scratch.S[o, t]
                to_W[t] += W * delta[o, t]
                to_S[t] += S * delta[o, t]
                d_delta[o, t] += d.end_W[t] * W + d.end_S[t] * S
        for t in range(n):  # end_W = -P w, end_S = -E w
            d_d.P[n, t] -= to_W[t] * block.w[s, t]
            d_d.E[n, t] -= to_S[t] * block.w[s, t]
            grads.w[s, t] -= to_W[t] * d.P[n, t] + to_S[t] * d.E[n, t]
        scale_columns(delta, d.end_W, scratch.W[:out])
        add_product(d_h, d_state[l, 0, :out, :width].T, scratch.W[:out])
        scale_columns(delta, d.end_S, scratch.S[:out])
        add_product(d_h, d_state[l, 1, :out, :width].T, scratch.S[:out])
        for o in range(rule.widths[l + 1]):
            a, b, e = h.dtype.type(0), h.dtype.type(0), h.dtype.type(0)
            for i in range(rule.widths[l]):
                a += d_state[l, 0, o, i] * state[l, 0, o, i]
                b += d_state[l, 0, o, i] * state[l, 1, o, i]
                e += d_state[l, 1, o, i] * state[l, 1, o, i]
            d_d.a[n] += a
            d_d.b[n] += b
            d_d.e[n] += e


@njit(fastmath=FAST, **OPTIONS)
def read_backward(state, d_state, s, block, q, q_rows, n, hidden, d, grads, d_d, scratch, rule):
    """Gradients that go through a block's reads, and its state's whole; scratch.d_r, at first d_y, becomes d_q.

    q [P, block] and q_rows [block, P] are the queries."""
    L, N, shift = len(rule.widths) - 1, rule.block, 1 if rule.own_write else 0
    attention, d_attention, turned = scratch.attention[1], scratch.attention[2], scratch.attention[3]
    d_steps = scratch.attention[0]
    d_steps[:] = 0
    d_a, d_b = np.zeros(N, q.dtype), np.zeros(N, q.dtype)
    at = hidden.shape[0] - rule.widths[L]
    for l in range(L - 1, -1, -1):
        width, out = rule.pads[l], rule.pads[l + 1]
        x, d_r, W, S = scratch.x[:width], scratch.d_r[:out], scratch.W[:width], scratch.S[:width]
        if l:
            at -= rule.widths[l]
            x[:] = 0  # where no token or feature is
            activate_with_slope(rule.kind, hidden[at : at + rule.widths[l]], x, scratch.slope[:width])
            transpose(x, scratch.rows)
            at -= 2 * rule.widths[l]
        else:
            x[:] = q[:width]
        product(W, state[l, 0, :out, :width].T, d_r)
        product(S, state[l, 1, :out, :width].T, d_r)
        for f in range(width):
            for t in range(N):
                d_a[t] += W[f, t] * x[f, t]
                d_b[t] += S[f, t] * x[f, t]
                W[f, t] = d.read_a[t] * W[f, t] + d.read_b[t] * S[f, t]
        h, delta = block.h[s, l, :width], block.delta[s, l, :out]
        product(attention, h.T, x)
        product(d_attention, delta.T, d_r)
        for j in range(N):
            for i in range(N):
                d_steps[j, i] += attention[j, i] * d_attention[j, i]
        multiply(attention, d.steps, attention)
        multiply(d_attention, d.steps, d_attention)
        transpose(attention, turned)
        add_product(grads.delta[s, l, :out], d_r, turned)
        transpose(d_attention, turned)
        add_product(grads.h[s, l, :width], x, turned)
        add_product(W, h, d_attention)
        rows = scratch.rows if l else q_rows
        W_rows, S_rows = d_state[l, 0, :out, :width], d_state[l, 1, :out, :width]
        by_a = scratch.S[:out]
        scale_columns(d_r, d.read_b, by_a)
        mix_add(S_rows, d.e[n], S_rows, d.b[n], W_rows, by_a, rows[:, :width])
        scale_columns(d_r, d.read_a, by_a)
        scale_add(W_rows, d.a[n], W_rows, by_a, rows[:, :width])
        if l:
            multiply(W, scratch.slope[:width], scratch.d_r[:width])
        else:
            scratch.d_r[:width] = W
    for i in range(n):  # steps[j, i] = -P[i + shift, j] w[j]
        d_d.a[i + shift] += d_a[i]
        d_d.b[i + shift] += d_b[i]
        for j in range(i + shift):
            d_d.P[i + shift, j] -= d_steps[j, i] * block.w[s, j]
            grads.w[s, j] -= d_steps[j, i] * d.P[i + shift, j]


@njit(fastmath=FAST, **OPTIONS)
def decay_backward(keep, eta, s, n, d, d_d, grads):
    """The recursion of `decay`, backwards."""
    for i in range(n, 0, -1):
        k, m = keep[i - 1], eta[i - 1]
        d_d.e[i] += d_d.b[i]
        d_k = d_d.a[i] * d.a[i - 1] + d_d.b[i] * d.b[i - 1]
        d_m = d_d.e[i] * d.e[i - 1]
        d_d.a[i - 1] += k * d_d.a[i]
        d_d.b[i - 1] += k * d_d.b[i]
        d_d.e[i - 1] += m * d_d.e[i]
        for j in range(i - 1):
            d_d.E[i, j] += d_d.P[i, j]
            d_k += d_d.P[i, j] * d.P[i - 1, j]
            d_m += d_d.E[i, j] * d.E[i - 1, j]
            d_d.P[i - 1, j] += k * d_d.P[i, j]
            d_d.E[i - 1, j] += m * d_d.E[i, j]
        grads.keep[s, i - 1], grads.eta[s, i - 1] = d_k, d_m


@njit(fastmath=FAST, **OPTIONS)
def steps_backward(theta, s, n, block, grads, rule):
    """grads.w becomes that of theta; clip: h and delta set the scale of the steps."""
    w = grads.w[s]
    if rule.threshold > 0:
        w *= large_enough(block, s, rule)
    if rule.clip > 0:
        square = squared_gradients(block, s, rule)
        scale = clip_scales(square, rule.clip)
        # d scale / d square = -scale / (2 square) where it clips; the 2 goes against those of the squares
        d_square = np.zeros(rule.block, w.dtype)
        for t in range(n):
            if square[t] > rule.clip * rule.clip:
                d_square[t] = -w[t] * theta[t] * scale[t] / square[t]
        for l in range(len(rule.widths) - 1):
            width, out = rule.pads[l], rule.pads[l + 1]
            h, delta, d_h, d_delta = block.h[s, l], block.delta[s, l], grads.h[s, l], grads.delta[s, l]
            for t in range(n):
                if d_square[t] != 0:
                    x, d = w.dtype.type(0), w.dtype.type(0)
                    for f in range(width):
                        x += h[f, t] * h[f, t]
                    for f in range(out):
                        d += delta[f, t] * delta[f, t]
                    for f in range(width):
                        d_h[f, t] += d_square[t] * d * h[f, t]
                    for f in range(out):
                        d_delta[f, t] += d_square[t] * x * delta[f, t]
        w *= scale


@njit(fastmath=FAST, **OPTIONS)
def surprise_backward(weights, d_weights, s, block, grads, scratch, rule):
    """Adds to the gradients of h and of the weights [L, P, P + PAD]; that of delta's last is the error's."""
    last, pads, N = len(rule.widths) - 2, rule.pads, rule.block
    for l in range(last):  # delta_l = (W_{l+1}' delta_{l+1}) act'(z_l)
        width, out = pads[l + 1], pads[l + 2]
        d_g, d_delta = scratch.x[:width], grads.delta[s, l, :width]
        multiply(d_delta, block.slope[s, l, :width], d_g)
        multiply(d_delta, block.bend[s, l, :width], d_delta)  # from here on the gradient of z_l
        add_product(grads.delta[s, l + 1, :out], weights[l + 1, :out, :width], d_g)
        transpose(d_g, scratch.rows)
        d_W = d_weights[l + 1, :out, :width]
        add_product(d_W, block.delta[s, l + 1, :out], scratch.rows[:, :width])
    for l in range(last, -1, -1):  # z_l = W_l h_l
        width, out = pads[l], pads[l + 1]
        d_out, d_h = grads.delta[s, l, :out], grads.h[s, l, :width]
        d_W = d_weights[l, :out, :width]
        add_product(d_W, d_out, block.rows[s, l][:, :width])
        add_product(d_h, weights[l, :out, :width].T, d_out)
        if l:
            d_z, slope = grads.delta[s, l - 1], block.slope[s, l - 1]
            for f in range(width):
                for t in range(N):
                    d_z[f, t] += d_h[f, t] * slope[f, t]


@njit(fastmath=FAST, **OPTIONS)
def normalize_backward(rows, inverse, d_rows, n, rule):
    """d_rows, the gradient of n unit rows, becomes that of the rows before `normalize`."""
    if rule.normalize:
        for i in range(n):
            along = rows.dtype.type(0)
            for f in range(rows.shape[1]):
                along += rows[i, f] * d_rows[i, f]
            if inverse[i] >= rows.dtype.type(1e12):
                along = rows.dtype.type(0)  # shorter than 1e-12: only scaled
            for f in range(rows.shape[1]):
                d_rows[i, f] = inverse[i] * (d_rows[i, f] - along * rows[i, f])


@njit(fastmath=FAST, **OPTIONS)
def backward(
    tokens, rule, start, kept, hidden, d_y, d_strides, d_final, d_final_start,
    d_q, d_k, d_v, d_gates, d_state, d_start, first, last,
):  # fmt: skip
    """Gradients of the tokens, zero at pads, of the first state and of `start`; shapes as in `forward`."""
    q, k, _, strides, gates, mask, position = tokens
    T, H = d_q.shape[1:3]
    L, per_chunk = len(rule.widths) - 1, (rule.chunk + rule.block - 1) // rule.block
    slots = rule.stride * per_chunk
    block, d, grads, scratch = (
        blocks_of(kept, rule, slots, False),
        decays_of(kept, rule),
        grads_of(kept, rule, slots),
        scratch_of(kept, rule),
    )
    rows, squares = np.zeros((3, rule.block + 1), kept.dtype), np.zeros((2, rule.block + 1, rule.block), kept.dtype)
    d_d = DecayGrads(rows[0], rows[1], rows[2], squares[0], squares[1])
    history, more = states_of(kept, rule, slots), states_of(kept, rule, 3)
    begin, d_begin, d_now = more[0], more[1], more[2]
    P, Pk, Pv = rule.pads.max(), rule.pads[0], rule.pads[L]
    query = aligned(kept, P, rule.block).reshape((P, rule.block))
    queries, d_reads, d_rows = aligned(kept, 3 * rule.block, P).reshape((3, rule.block, P))
    span = slots * rule.block  # tokens of a segment, or more
    at, length = np.zeros(slots, np.int64), np.zeros(slots, np.int64)  # first token and tokens of a block
    firsts = np.zeros(rule.stride + 1, np.int64)  # of a chunk's blocks
    zero, one, dk, dv = kept.dtype.type(0), kept.dtype.type(1), rule.widths[0], rule.widths[L]
    inverse = np.empty((slots + 1, rule.block), kept.dtype)  # of the norms of k, and of q
    for task in range(first, last):
        b, head = task // H, task % H
        index, filled = real_tokens(mask, b, T), position[b]
        keep, eta, theta = gates[0, b, head], gates[1, b, head], gates[2, b, head]
        load_state(d_final[task], d_now, zero, rule)
        load_state(start[task], begin, zero, rule)
        d_begin[:] = 0
        chunks = (filled + len(index) + rule.chunk - 1) // rule.chunk if len(index) else 0
        owner = chunks if (filled + len(index)) % rule.chunk == 0 else chunks - 1  # whose start is final_start
        if chunks == 0:
            load_state(d_final_start[task], d_begin, zero, rule)
        elif owner == chunks:
            load_state(d_final_start[task], d_now, one, rule)
        for segment in range((chunks - 1) // rule.stride, -1, -1):
            c0, c1 = segment * rule.stride, min((segment + 1) * rule.stride, chunks)
            load_state(kept[task, segment], history[0], zero, rule)
            s = 0
            for c in range(c0, c1):
                t, stop = max(c * rule.chunk - filled, 0), min((c + 1) * rule.chunk - filled, len(index))
                firsts[c - c0], part = s, c * per_chunk
                while t < stop:
                    here = index[t : min(t + rule.block, stop)]
                    n = len(here)
                    at[s], length[s] = t, n
                    gather(k, strides[1], b, head, here, dk, block.rows[s, 0])
                    normalize(block.rows[s, 0], inverse[s], n, rule)
                    transpose(block.rows[s, 0][:, :Pk], block.h[s, 0])
                    recall(block, s, hidden[task, part], rule)
                    complete(block, s, theta[here], n, rule)
                    t, part = t + n, part + 1
                    if t < stop or c + 1 < c1:
                        decay(keep[here], eta[here], block.w[s], n, d, rule)
                        advance(history[s], history[s + 1], s, block, n, d, scratch.both, rule)
                    s += 1
            firsts[c1 - c0] = s
            grads.h[:s] = 0
            grads.delta[:s] = 0
            grads.w[:s] = 0
            for c in range(c1 - 1, c0 - 1, -1):
                for s in range(firsts[c - c0 + 1] - 1, firsts[c - c0] - 1, -1):
                    n, part = length[s], c * per_chunk + s - firsts[c - c0]
                    here = index[at[s] : at[s] + n]
                    gather(q, strides[0], b, head, here, dk, queries)
                    gather(d_y, d_strides, b, head, here, dv, d_reads)
                    expect(q, strides[0], b, head, index, at[s] - rule.block, at[s], dk)
                    normalize(queries, inverse[slots], n, rule)
                    transpose(queries[:, :Pk], query)
                    transpose(d_reads[:, :Pv], scratch.d_r)
                    decay(keep[here], eta[here], block.w[s], n, d, rule)
                    rows[:] = 0
                    squares[:] = 0
                    update_backward(history[s], d_now, s, block, n, d, grads, d_d, scratch, rule)
                    expect(d_y, d_strides, b, head, index, at[s] - rule.block, at[s], dv)
                    read_backward(
                        history[s], d_now, s, block, query, queries, n, hidden[task, part], d, grads, d_d, scratch,
                        rule,
                    )  # fmt: skip
                    expect(k, strides[1], b, head, index, at[s] - span, at[s] - span + n, dk)
                    decay_backward(keep[here], eta[here], s, n, d, d_d, grads)
                    transpose(scratch.d_r[:Pk], d_rows)
                    if rule.residual:
                        d_rows += d_reads
                    normalize_backward(queries, inverse[slots], d_rows, n, rule)
                    scatter(d_rows, b, head, here, d_q)
                weights = history[firsts[c - c0]][:, 0] if c else begin[:, 0]
                d_weights = d_now[:, 0] if c else d_begin[:, 0]
                for s in range(firsts[c - c0], firsts[c - c0 + 1]):
                    here = index[at[s] : at[s] + length[s]]
                    steps_backward(theta[here], s, length[s], block, grads, rule)
                    surprise_backward(weights, d_weights, s, block, grads, scratch, rule)
                    transpose(grads.delta[s, L - 1, :Pv], d_reads)
                    d_reads *= -one
                    scatter(d_reads, b, head, here, d_v)
                    transpose(grads.h[s, 0, :Pk], d_rows)
                    if rule.residual:
                        d_rows -= d_reads
                    normalize_backward(block.rows[s, 0], inverse[s], d_rows, length[s], rule)
                    scatter(d_rows, b, head, here, d_k)
                    for i in range(length[s]):
                        d_gates[0, b, head, here[i]] = grads.keep[s, i]
                        d_gates[1, b, head, here[i]] = grads.eta[s, i]
                        d_gates[2, b, head, here[i]] = grads.w[s, i]
                if c == owner:
                    load_state(d_final_start[task], d_now if c else d_begin, one, rule)
                if c and rule.detach_every and c % rule.detach_every == 0:
                    d_now[:] = 0
            flush(d_now, rule)
        store_state(d_now, d_state[task], rule)
        store_state(d_begin, d_start[task], rule)
