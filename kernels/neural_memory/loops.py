"""The neural memory as compiled CPU loops: one task walks one head of one row with its state in the cache.

The equations of `chunked.py` with pads left out rather than masked. A chunk is cut into blocks of at most `block`
tokens: gradients are taken at the chunk's first weights, reads and updates go block by block, which needs fewer
products than whole chunks and changes nothing.

Index legend: L layers, features are rows and tokens columns ([P, block], P the padded widths), a state is
[L, 2, P, P + PAD] of W and S, flat states are [2, size]. Everything beyond the real widths and tokens is 0.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.neural_memory.elements import activate, activate_with_slope, multiply, scale_columns, square_norms
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS
from memzoo.kernels.tiles import PAD, add_product, mix_add, prefetch, product, scale_add, transpose

Rule = namedtuple(
    "Rule", "widths pads chunk block stride kind clip threshold residual own_write detach_every normalize tiny"
)
# q, k, v [B, T, H, d] flat, with their strides [3, 3] over B, T and H; gates [3, B, H, T]: keep, eta, theta
Tokens = namedtuple("Tokens", "q k v strides gates mask position")
# One block: inputs of the layers, pre-activations, gradients before the slope and after it, the slope and its slope,
# the same inputs with tokens as rows, steps after clip and threshold.
Block = namedtuple("Block", "h z g delta slope bend rows w")
# One block's decays: factors of W and S after i tokens, b being that of S in W; of token j's step after i tokens in W
# and in S; -P w as the reads take them, [j, i]; minus what a step adds to W and to S at the block's end; W and S in
# the reads.
Decays = namedtuple("Decays", "a b e P E steps end_W end_S read_a read_b")


@njit(**OPTIONS)
def aligned(like, rows, columns):
    """Zeros [rows, columns] from a multiple of 64 bytes on: vectors then never straddle two cache lines."""
    size = rows * columns
    raw = np.zeros(size + 64 // like.itemsize, like.dtype)
    first = (-raw.ctypes.data % 64) // like.itemsize
    return raw[first : first + size]


@njit(**OPTIONS)
def blocks_of(like, rule, count, forward):
    """`count` blocks; only a forward needs z and g."""
    L, P, n = len(rule.widths) - 1, rule.pads.max(), rule.block
    parts = aligned(like, 4 * count * L * P, n).reshape((4, count, L, P, n))
    more = 1 if forward else 0
    inner = aligned(like, 2 * more * count * L * P, n).reshape((2, more * count, L, P, n))
    rows = aligned(like, count * L * n, P).reshape((count, L, n, P))
    w = np.zeros((count, n), like.dtype)
    return Block(parts[0], inner[0], inner[1], parts[1], parts[2], parts[3], rows, w)


@njit(**OPTIONS)
def states_of(like, rule, count):
    L, P = len(rule.widths) - 1, rule.pads.max()
    return aligned(like, count * L * 2 * P, P + PAD).reshape((count, L, 2, P, P + PAD))


@njit(**OPTIONS)
def decays_of(like, rule):
    n = rule.block
    rows, squares = (
        aligned(like, 7, n + PAD).reshape((7, n + PAD)),
        aligned(like, 3 * (n + 1), n).reshape((3, n + 1, n)),
    )
    return Decays(
        rows[0], rows[1], rows[2], squares[0], squares[1], squares[2], rows[3], rows[4], rows[5, :n], rows[6, :n]
    )


@njit(**OPTIONS)
def load_state(flat, state, keep, rule):
    """state [L, 2, P, P + PAD] = keep state + flat [2 or 1, size]; without S in flat only W."""
    at = 0
    for l in range(len(rule.widths) - 1):
        out, width = rule.widths[l + 1], rule.widths[l]
        for part in range(flat.shape[0]):
            for o in range(out):
                for i in range(width):
                    state[l, part, o, i] = keep * state[l, part, o, i] + flat[part, at + o * width + i]
        at += out * width


@njit(**OPTIONS)
def store_state(state, flat, rule):
    at = 0
    for l in range(len(rule.widths) - 1):
        out, width = rule.widths[l + 1], rule.widths[l]
        for part in range(flat.shape[0]):
            for o in range(out):
                for i in range(width):
                    flat[part, at + o * width + i] = state[l, part, o, i]
        at += out * width


@njit(fastmath=FAST, **OPTIONS)
def flush(state, rule):
    """Zero what changes no sum, before it becomes denormal: see `coefficients.py`."""
    for l in range(len(rule.widths) - 1):
        for part in range(2):
            for o in range(rule.widths[l + 1]):
                for i in range(rule.widths[l]):
                    x = state[l, part, o, i]
                    state[l, part, o, i] = x if abs(x) > rule.tiny else state.dtype.type(0)


@njit(**OPTIONS)
def real_tokens(mask, b, T):
    """Indices of the tokens of row b that are no pads."""
    index, n = np.empty(T, np.int64), 0
    for t in range(T):
        if mask.shape[0] == 0 or mask[b, t]:
            index[n] = t
            n += 1
    return index[:n]


@njit(**OPTIONS)
def gather(x, strides, b, h, index, d, rows):
    """rows [n, P] = x[b, t, h] for t in index, zero beyond."""
    n = len(index)
    for i in range(n):
        at = b * strides[0] + index[i] * strides[1] + h * strides[2]
        for f in range(d):
            rows[i, f] = x[at + f]
    rows[n:] = 0


@njit(**OPTIONS)
def scatter(rows, b, h, index, out):
    """out[b, t, h] for t in index: the rows, one after the other."""
    for i in range(len(index)):
        for f in range(out.shape[3]):
            out[b, index[i], h, f] = rows[i, f]


@njit(**OPTIONS)
def expect(x, strides, b, h, index, first, last, d):
    """Prefetch x[b, t, h] for t in index[first:last]: rows are too far apart for the processor to guess."""
    for i in range(max(first, 0), min(last, len(index))):
        prefetch(x, b * strides[0] + index[i] * strides[1] + h * strides[2], d)


@njit(fastmath=FAST, **OPTIONS)
def normalize(rows, inverse, n, rule):
    """The first n rows to unit length, in place; inverse keeps what they were multiplied by."""
    if rule.normalize:
        one, least = rows.dtype.type(1), rows.dtype.type(1e-12)
        for i in range(n):
            square = rows.dtype.type(0)
            for f in range(rows.shape[1]):
                square += rows[i, f] * rows[i, f]
            inverse[i] = one / max(np.sqrt(square), least)
            for f in range(rows.shape[1]):
                rows[i, f] *= inverse[i]


@njit(fastmath=FAST, **OPTIONS)
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


@njit(fastmath=FAST, **OPTIONS)
def squared_gradients(block, s, rule):
    """||g||^2 of every token: each gradient is an outer product delta h'."""
    n = rule.block
    total, x, d = np.zeros(n, block.w.dtype), np.empty(n, block.w.dtype), np.empty(n, block.w.dtype)
    for l in range(len(rule.widths) - 1):
        square_norms(block.h[s, l, : rule.pads[l]], x)
        square_norms(block.delta[s, l, : rule.pads[l + 1]], d)
        for t in range(n):
            total[t] += x[t] * d[t]
    return total


@njit(fastmath=FAST, **OPTIONS)
def clip_scales(square, clip):
    """min(1, clip / ||g||)."""
    return np.minimum(clip / np.sqrt(np.maximum(square, clip * clip)), square.dtype.type(1))


@njit(fastmath=FAST, **OPTIONS)
def large_enough(block, s, rule):
    """1 where the squared error reaches the threshold."""
    error = np.empty(rule.block, block.w.dtype)
    last = len(rule.widths) - 2
    square_norms(block.delta[s, last, : rule.pads[last + 1]], error)
    return (error >= rule.threshold).astype(block.w.dtype)


@njit(fastmath=FAST, **OPTIONS)
def complete(block, s, theta, n, rule):
    """The steps w of a block whose h and delta are there, and the inputs of the later layers with tokens as rows."""
    w = block.w[s]
    w[:n] = theta[:n]
    w[n:] = 0
    if rule.clip > 0:
        w *= clip_scales(squared_gradients(block, s, rule), rule.clip)
    if rule.threshold > 0:
        w *= large_enough(block, s, rule)
    for l in range(1, len(rule.widths) - 1):
        transpose(block.h[s, l, : rule.pads[l]], block.rows[s, l])


@njit(fastmath=FAST, **OPTIONS)
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


@njit(fastmath=FAST, **OPTIONS)
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


@njit(fastmath=FAST, **OPTIONS)
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


@njit(**OPTIONS)
def keep_hidden(block, s, outputs, to, rule):
    """z, g, the reads' hidden outputs and the error, to [rows, min(chunk, block)]."""
    last, at, n = len(rule.widths) - 2, 0, to.shape[1]
    for l in range(last):
        d = rule.widths[l + 1]
        for f in range(d):
            for t in range(n):
                to[at + f, t] = block.z[s, l, f, t]
                to[at + d + f, t] = block.g[s, l, f, t]
                to[at + 2 * d + f, t] = outputs[l, f, t]
        at += 3 * d
    for f in range(rule.widths[last + 1]):
        for t in range(n):
            to[at + f, t] = block.delta[s, last, f, t]


@njit(fastmath=FAST, **OPTIONS)
def forward(tokens, rule, state, start, y, final, final_start, kept, hidden, first, last):
    """state, final [G, 2, size]; start, final_start [G, 1, size]; y [B, T, H, dv], zero at pads.

    kept [G, segments, 2, size], the states at segment starts, and hidden [G, blocks, rows, n] are for the backward."""
    q, k, v, strides, gates, mask, position = tokens
    T, H = y.shape[1:3]
    L, P = len(rule.widths) - 1, rule.pads.max()
    per_chunk = (rule.chunk + rule.block - 1) // rule.block
    at_chunk = states_of(state, rule, 1)[0]
    block, d = blocks_of(state, rule, 1, True), decays_of(state, rule)
    tall, zero = max(P, rule.block), state.dtype.type(0)  # one of the buffers holds attention
    buffers = aligned(state, (L + 5) * tall, rule.block).reshape((L + 5, tall, rule.block))
    outputs, scratch, target, query = buffers[5:], buffers[:3], buffers[3], buffers[4]
    rows = aligned(state, 3 * rule.block, P).reshape((3, rule.block, P))
    dk, dv, inverse = rule.widths[0], rule.widths[L], np.empty(rule.block, state.dtype)
    Pk, Pv, keys = rule.pads[0], rule.pads[L], block.rows[0, 0]
    to, to_strides = y.reshape(-1), np.array([T * H * dv, H * dv, dv])
    for task in range(first, last):
        b, head = task // H, task % H
        index = real_tokens(mask, b, T)
        now = states_of(state, rule, 1)[0]
        load_state(state[task], now, zero, rule)
        load_state(start[task], at_chunk, zero, rule)
        final_start[task] = start[task]
        done, chunk, filled = 0, 0, position[b]
        while done < len(index):
            stop = min(done + rule.chunk - filled, len(index))
            if chunk:
                at_chunk[:, 0] = now[:, 0]
            if kept.shape[1] > 0 and chunk % rule.stride == 0:
                store_state(now, kept[task, chunk // rule.stride], rule)
            if stop == len(index):
                store_state(at_chunk, final_start[task], rule)
            part = chunk * per_chunk
            while done < stop:
                here = index[done : min(done + rule.block, stop)]
                n = len(here)
                gather(q, strides[0], b, head, here, dk, rows[0])
                gather(k, strides[1], b, head, here, dk, keys)
                gather(v, strides[2], b, head, here, dv, rows[1])
                expect(to, to_strides, b, head, index, done, done + n, dv)
                normalize(rows[0], inverse, n, rule)
                normalize(keys, inverse, n, rule)
                transpose(rows[0][:, :Pk], query)
                transpose(keys[:, :Pk], block.h[0, 0])
                transpose(rows[1][:, :Pv], target)
                if rule.residual:
                    target[:P] -= block.h[0, 0]
                following = done + n + rule.block
                expect(q, strides[0], b, head, index, done + n, following, dk)
                surprise(at_chunk[:, 0], 0, block, target, rule)
                expect(k, strides[1], b, head, index, done + n, following, dk)
                complete(block, 0, gates[2, b, head][here], n, rule)
                decay(gates[0, b, head][here], gates[1, b, head][here], block.w[0], n, d, rule)
                read(now, 0, block, query, d, outputs, scratch, rule)
                expect(v, strides[2], b, head, index, done + n, following, dv)
                transpose(outputs[L - 1, :Pv], rows[2])
                if rule.residual:
                    rows[2] += rows[0]
                scatter(rows[2], b, head, here, y)
                if kept.shape[1] > 0:
                    keep_hidden(block, 0, outputs, hidden[task, part], rule)
                advance(now, now, 0, block, n, d, scratch, rule)
                done, part = done + n, part + 1
            chunk, filled = chunk + 1, 0
            if chunk % rule.stride == 0:
                flush(now, rule)
        store_state(now, final[task], rule)
        if done and (position[b] + done) % rule.chunk == 0:
            store_state(now, final_start[task], rule)
