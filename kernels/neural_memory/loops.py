"""The neural memory as compiled CPU loops: one task walks one head of one row with its state in the cache.

The equations of `chunked.py` with pads left out rather than masked. A chunk is cut into blocks of at most `block`
tokens: gradients are taken at the chunk's first weights, reads and updates go block by block, which needs fewer
products than whole chunks and changes nothing.

Index legend: L layers, features are rows and tokens columns ([P, block], P the padded widths), a state is
[L, 2, P, P + PAD] of W and S. Everything beyond the real widths and tokens is 0.
"""

import numpy as np
from numba import njit

from memzoo.kernels.compiled import FAST, UNCOUNTED
from memzoo.kernels.neural_memory.elements import (
    activate,
    activate_with_slope,
    copy,
    multiply,
    scale_columns,
    square_norms,
)
from memzoo.kernels.tiles import add_product, mix_add, product, scale_add, transpose


@njit(fastmath=FAST, **UNCOUNTED)
def surprise(weights, s, block, target, rule):
    """Gradients at weights [L, P, P + PAD] for the keys in block.h[s, 0]."""
    last, pads = len(rule.widths) - 2, rule.pads
    for l in range(last):
        out = pads[l + 1]
        product(block.z[s, l, :out], weights[l, :out, : pads[l]], block.h[s, l, : pads[l]])
        activate_with_slope(rule.kind, block.z[s, l, :out], block.h[s, l + 1, :out], block.slope[s, l, :out])
    out = pads[last + 1]
    error = block.delta[s, last, :out]
    product(error, weights[last, :out, : pads[last]], block.h[s, last, : pads[last]])
    for f in range(out):
        for t in range(error.shape[1]):
            error[f, t] -= target[f, t]
    for l in range(last, 0, -1):
        width = pads[l]
        product(block.g[s, l - 1, :width], weights[l, : pads[l + 1], :width].T, block.delta[s, l, : pads[l + 1]])
        multiply(block.g[s, l - 1, :width], block.slope[s, l - 1, :width], block.delta[s, l - 1, :width])


@njit(fastmath=FAST, **UNCOUNTED)
def clip_scales(block, s, rule):
    """sums[0]: ||g||^2 of every token, a gradient being an outer product delta h'. sums[1]: min(1, clip / ||g||)."""
    total, scale, x, d = block.sums[0], block.sums[1], block.sums[2], block.sums[3]
    total[:] = 0
    for l in range(len(rule.widths) - 1):
        square_norms(block.h[s, l, : rule.pads[l]], x)
        square_norms(block.delta[s, l, : rule.pads[l + 1]], d)
        for t in range(rule.block):
            total[t] += x[t] * d[t]
    least, one = rule.clip * rule.clip, total.dtype.type(1)
    for t in range(rule.block):
        scale[t] = rule.clip / np.sqrt(total[t]) if total[t] > least else one


@njit(fastmath=FAST, **UNCOUNTED)
def drop_small(block, s, values, rule):
    """values = 0 where the squared error is below the threshold."""
    last, error = len(rule.widths) - 2, block.sums[2]
    square_norms(block.delta[s, last, : rule.pads[last + 1]], error)
    for t in range(rule.block):
        if not error[t] >= rule.threshold:
            values[t] = 0


@njit(fastmath=FAST, **UNCOUNTED)
def complete(block, s, theta, n, rule):
    """The steps w of a block whose h and delta are there, and the inputs of the later layers with tokens as rows."""
    w = block.w[s]
    for t in range(rule.block):
        w[t] = theta[t] if t < n else w.dtype.type(0)
    if rule.clip > 0:
        clip_scales(block, s, rule)
        for t in range(rule.block):
            w[t] *= block.sums[1, t]
    if rule.threshold > 0:
        drop_small(block, s, w, rule)
    for l in range(1, len(rule.widths) - 1):
        transpose(block.h[s, l, : rule.pads[l]], block.rows[s, l])


@njit(fastmath=FAST, **UNCOUNTED)
def decay(keep, eta, w, n, d, rule):
    """Fill the decays of a block's first n tokens: W_i = keep_i W_{i-1} + S_i, S_i = eta_i S_{i-1} - w_i g_i."""
    one, zero, tiny = w.dtype.type(1), w.dtype.type(0), rule.tiny
    a, b, e, P, E = d.a, d.b, d.e, d.P, d.E
    a[0], b[0], e[0] = one, zero, one
    P[0], E[0] = 0, 0
    for i in range(n):
        k, m = keep[i], eta[i]
        a[i + 1], e[i + 1] = k * a[i], m * e[i]
        if abs(a[i + 1]) <= tiny:
            a[i + 1] = zero
        if abs(e[i + 1]) <= tiny:
            e[i + 1] = zero
        b[i + 1] = k * b[i] + e[i + 1]
        for j in range(rule.block):
            x = m * E[i, j]
            x = x if abs(x) > tiny else zero
            E[i + 1, j] = x
            x += k * P[i, j]
            P[i + 1, j] = x if abs(x) > tiny else zero
        E[i + 1, i], P[i + 1, i] = one, one
    shift = 1 if rule.own_write else 0
    d.steps[:] = 0
    for i in range(rule.block):
        inside = i < n
        d.read_a[i], d.read_b[i] = (a[i + shift], b[i + shift]) if inside else (zero, zero)
        if inside:
            for j in range(i + shift):
                d.steps[j, i] = -P[i + shift, j] * w[j]
        d.end_W[i], d.end_S[i] = -P[n, i] * w[i], -E[n, i] * w[i]


@njit(fastmath=FAST, **UNCOUNTED)
def read(state, s, block, query, d, outputs, scratch, rule):
    """All layers at the query [P, block], with their outputs in outputs [L, P, block]; scratch [3, P, block]."""
    last, attention = len(rule.widths) - 2, scratch[1, : rule.block]
    for l in range(last + 1):
        width, out = rule.pads[l], rule.pads[l + 1]
        x = scratch[2] if l else query
        if l:
            activate(rule.kind, outputs[l - 1, :width], x[:width])
        scale_columns(x[:width], d.read_a, scratch[0, :width])
        product(outputs[l, :out], state[l, 0, :out, :width], scratch[0, :width])
        scale_columns(x[:width], d.read_b, scratch[0, :width])
        add_product(outputs[l, :out], state[l, 1, :out, :width], scratch[0, :width])
        product(attention, block.h[s, l, :width].T, x[:width])
        multiply(attention, d.steps, attention)
        add_product(outputs[l, :out], block.delta[s, l, :out], attention)


@njit(fastmath=FAST, **UNCOUNTED)
def advance(state, after, s, block, n, d, scratch, rule):
    """The state after a block's n tokens, to `after`, which may be `state` itself."""
    for l in range(len(rule.widths) - 1):
        width, out = rule.pads[l], rule.pads[l + 1]
        W, S, delta = state[l, 0, :out, :width], state[l, 1, :out, :width], block.delta[s, l, :out]
        rows = block.rows[s, l][:, :width]
        scale_columns(delta, d.end_W, scratch[0, :out])
        mix_add(after[l, 0, :out, :width], d.a[n], W, d.b[n], S, scratch[0, :out], rows)
        scale_columns(delta, d.end_S, scratch[0, :out])
        scale_add(after[l, 1, :out, :width], d.e[n], S, scratch[0, :out], rows)


@njit(**UNCOUNTED)
def keep_hidden(block, s, outputs, to, rule):
    """z, g, the reads' hidden outputs and the error, to [rows, min(chunk, block)]."""
    last, at = len(rule.widths) - 2, 0
    for l in range(last):
        d = rule.widths[l + 1]
        copy(block.z[s, l], to[at : at + d])
        copy(block.g[s, l], to[at + d : at + 2 * d])
        copy(outputs[l], to[at + 2 * d : at + 3 * d])
        at += 3 * d
    copy(block.delta[s, last], to[at:])
