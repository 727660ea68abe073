"""The backward of `loops.py`: segments of chunks from the last to the first, each replayed from its first state.

Names as there and in `backward.py`; d_ before a name is the gradient of the outer loss.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, OPTIONS, UNCOUNTED
from memzoo.kernels.neural_memory.elements import (
    activate_with_slope,
    add_column_dots,
    add_columns,
    copy,
    differentiate,
    mix_columns,
    multiply,
    scale_columns,
)
from memzoo.kernels.neural_memory.loops import (
    clip_scales,
    drop_small,
)
from memzoo.kernels.neural_memory.rows import (
    room,
)
from memzoo.kernels.tiles import add_product, mix_add, product, scale_add, transpose

# Gradients of a segment's h and delta [slots, L, P, block] and of the gates [slots, block].
Grads = namedtuple("Grads", "h delta keep eta w")
# Gradients of a block's decays: of a, b, e, P and E after i tokens.
DecayGrads = namedtuple("DecayGrads", "a b e P E")
Scratch = namedtuple("Scratch", "x rows slope d_r W S both attention sums")


@njit(**OPTIONS)
def grads_of(like, rule, count):
    L, P, n = len(rule.widths) - 1, rule.pads.max(), rule.block
    parts = room(like, 2 * count * L * P, n, rule).reshape((2, count, L, P, n))
    gates = np.zeros((3, count, n), like.dtype)
    return Grads(parts[0], parts[1], gates[0], gates[1], gates[2])


@njit(**OPTIONS)
def scratch_of(like, rule):
    P, n = rule.pads.max(), rule.block
    wide = room(like, 5 * P, n, rule).reshape((5, P, n))
    return Scratch(
        wide[0], room(like, n, P, rule).reshape((n, P)), wide[1], wide[2], wide[3], wide[4], wide[3:],
        room(like, 4 * n, n, rule).reshape((4, n, n)), np.zeros((2, n), like.dtype),
    )  # fmt: skip


@njit(fastmath=FAST, **UNCOUNTED)
def recall(block, s, kept, rule):
    """Fill a block from what the forward kept; h_0 is there."""
    last, at = len(rule.widths) - 2, 0
    for l in range(last):
        d = rule.widths[l + 1]
        z, g, bend = kept[at : at + d], kept[at + d : at + 2 * d], block.bend[s, l]
        differentiate(rule.kind, z, block.h[s, l + 1], block.slope[s, l], bend)
        multiply(g, block.slope[s, l], block.delta[s, l])
        multiply(g, bend, bend)
        at += 3 * d
    copy(kept[at:], block.delta[s, last])


@njit(fastmath=FAST, **UNCOUNTED)
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
        add_column_dots(scratch.W[:out], delta, to_W)
        add_column_dots(scratch.S[:out], delta, to_S)
        add_columns(scratch.W[:out], d.end_W, scratch.S[:out], d.end_S, d_delta)
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


@njit(fastmath=FAST, **UNCOUNTED)
def read_backward(state, d_state, s, block, q, q_rows, n, hidden, d, grads, d_d, scratch, rule):
    """Gradients that go through a block's reads, and its state's whole; scratch.d_r, at first d_y, becomes d_q.

    q [P, block] and q_rows [block, P] are the queries."""
    L, N, shift = len(rule.widths) - 1, rule.block, 1 if rule.own_write else 0
    attention, d_attention, turned = scratch.attention[1], scratch.attention[2], scratch.attention[3]
    d_steps = scratch.attention[0]
    d_steps[:] = 0
    d_a, d_b = scratch.sums[0], scratch.sums[1]
    d_a[:] = 0
    d_b[:] = 0
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
            copy(q[:width], x)
        product(W, state[l, 0, :out, :width].T, d_r)
        product(S, state[l, 1, :out, :width].T, d_r)
        add_column_dots(W, x, d_a)
        add_column_dots(S, x, d_b)
        mix_columns(W, d.read_a, S, d.read_b)
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
            copy(W, scratch.d_r[:width])
    for i in range(n):  # steps[j, i] = -P[i + shift, j] w[j]
        d_d.a[i + shift] += d_a[i]
        d_d.b[i + shift] += d_b[i]
        for j in range(i + shift):
            d_d.P[i + shift, j] -= d_steps[j, i] * block.w[s, j]
            grads.w[s, j] -= d_steps[j, i] * d.P[i + shift, j]


@njit(fastmath=FAST, **UNCOUNTED)
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


@njit(fastmath=FAST, **UNCOUNTED)
def steps_backward(theta, s, n, block, grads, rule):
    """grads.w becomes that of theta; clip: h and delta set the scale of the steps."""
    w = grads.w[s]
    if rule.threshold > 0:
        drop_small(block, s, w, rule)
    if rule.clip > 0:
        clip_scales(block, s, rule)
        square, scale, d_square = block.sums[0], block.sums[1], block.sums[2]
        # d scale / d square = -scale / (2 square) where it clips; the 2 goes against those of the squares
        for t in range(rule.block):
            clips = t < n and square[t] > rule.clip * rule.clip
            d_square[t] = -w[t] * theta[t] * scale[t] / square[t] if clips else w.dtype.type(0)
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
        for t in range(rule.block):
            w[t] *= scale[t]


@njit(fastmath=FAST, **UNCOUNTED)
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
