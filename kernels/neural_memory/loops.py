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

from memzoo.kernels.neural_memory.elements import (
    UNCOUNTED,
    activate,
    activate_with_slope,
    copy,
    multiply,
    scale_columns,
    square_norms,
)
from memzoo.kernels.neural_memory.rows import (
    aligned,
    expect,
    flush,
    gather,
    load_state,
    normalize,
    pick,
    real_tokens,
    scatter,
    store_state,
)
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS
from memzoo.kernels.tiles import PAD, add_product, mix_add, prefetch, product, scale_add, transpose

Rule = namedtuple(
    "Rule", "widths pads chunk block stride kind clip threshold residual own_write detach_every normalize tiny"
)
# q, k, v [B, T, H, d] flat, with their strides [3, 3] over B, T and H; gates [3, B, H, T]: keep, eta, theta
Tokens = namedtuple("Tokens", "q k v strides gates mask position")
# One block: inputs of the layers, pre-activations, gradients before the slope and after it, the slope and its slope,
# the same inputs with tokens as rows, steps after clip and threshold, and room for four numbers a token.
Block = namedtuple("Block", "h z g delta slope bend rows w sums")
# One block's decays: factors of W and S after i tokens, b being that of S in W; of token j's step after i tokens in W
# and in S; -P w as the reads take them, [j, i]; minus what a step adds to W and to S at the block's end; W and S in
# the reads.
Decays = namedtuple("Decays", "a b e P E steps end_W end_S read_a read_b")


@njit(**OPTIONS)
def blocks_of(like, rule, count, forward):
    """`count` blocks; only a forward needs z and g."""
    L, P, n = len(rule.widths) - 1, rule.pads.max(), rule.block
    parts = aligned(like, 4 * count * L * P, n).reshape((4, count, L, P, n))
    more = 1 if forward else 0
    inner = aligned(like, 2 * more * count * L * P, n).reshape((2, more * count, L, P, n))
    rows = aligned(like, count * L * n, P).reshape((count, L, n, P))
    w = np.zeros((count, n), like.dtype)
    sums = np.zeros((4, n), like.dtype)
    return Block(parts[0], inner[0], inner[1], parts[1], parts[2], parts[3], rows, w, sums)


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


Buffers = namedtuple("Buffers", "block decays chunk now outputs scratch target query rows gates inverse index")


@njit(**OPTIONS)
def buffers_of(like, rule, T):
    """What `forward` works in."""
    L, P, n = len(rule.widths) - 1, rule.pads.max(), rule.block
    tall = max(P, n)  # one of them holds attention
    tiles = aligned(like, (L + 5) * tall, n).reshape((L + 5, tall, n))
    states = states_of(like, rule, 2)
    return Buffers(
        blocks_of(like, rule, 1, True), decays_of(like, rule), states[0], states[1], tiles[5:], tiles[:3], tiles[3],
        tiles[4], aligned(like, 3 * n, P).reshape((3, n, P)), np.zeros((3, n), like.dtype), np.empty(n, like.dtype),
        np.empty(T, np.int64),
    )  # fmt: skip


@njit(fastmath=FAST, **UNCOUNTED)
def load_block(tokens, b, head, here, x, rule):
    """The block's queries, keys and values as columns, and its gates."""
    q, k, v, strides, gates = tokens.q, tokens.k, tokens.v, tokens.strides, tokens.gates
    keys, n, (Pk, Pv) = x.block.rows[0, 0], len(here), (rule.pads[0], rule.pads[-1])
    gather(q, strides[0], b, head, here, rule.widths[0], x.rows[0])
    gather(k, strides[1], b, head, here, rule.widths[0], keys)
    gather(v, strides[2], b, head, here, rule.widths[-1], x.rows[1])
    normalize(x.rows[0], x.inverse, n, rule)
    normalize(keys, x.inverse, n, rule)
    transpose(x.rows[0][:, :Pk], x.query)
    transpose(keys[:, :Pk], x.block.h[0, 0])
    transpose(x.rows[1][:, :Pv], x.target)
    if rule.residual:
        for f in range(Pk):
            for t in range(rule.block):
                x.target[f, t] -= x.block.h[0, 0, f, t]
    for i in range(3):
        pick(gates[i, b, head], here, x.gates[i])


@njit(fastmath=FAST, **UNCOUNTED)
def walk(tokens, rule, state, start, x, y, final, final_start, kept, hidden, b, head):
    """One head of one row: `forward` for a task, its arrays without the first axis."""
    q, k, v, strides = tokens.q, tokens.k, tokens.v, tokens.strides
    T, H, dv = y.shape[1:]
    L, dk = len(rule.widths) - 1, rule.widths[0]
    per_chunk = (rule.chunk + rule.block - 1) // rule.block
    index = x.index[: real_tokens(tokens.mask, b, x.index)]
    load_state(state, x.now, state.dtype.type(0), rule)
    load_state(start, x.chunk, state.dtype.type(0), rule)
    store_state(x.chunk, final_start, rule)
    done, chunk, filled = 0, 0, tokens.position[b]
    while done < len(index):
        stop = min(done + rule.chunk - filled, len(index))
        if chunk:
            for l in range(L):
                copy(x.now[l, 0], x.chunk[l, 0])
        if kept.shape[0] > 0 and chunk % rule.stride == 0:
            store_state(x.now, kept[chunk // rule.stride], rule)
        if stop == len(index):
            store_state(x.chunk, final_start, rule)
        part = chunk * per_chunk
        while done < stop:
            here = index[done : min(done + rule.block, stop)]
            n = len(here)
            following = done + n + rule.block
            load_block(tokens, b, head, here, x, rule)
            for i in range(done, done + n):
                prefetch(y.reshape(-1), ((b * T + index[i]) * H + head) * dv, dv)
            expect(q, strides[0], b, head, index, done + n, following, dk)
            surprise(x.chunk[:, 0], 0, x.block, x.target, rule)
            expect(k, strides[1], b, head, index, done + n, following, dk)
            complete(x.block, 0, x.gates[2], n, rule)
            decay(x.gates[0], x.gates[1], x.block.w[0], n, x.decays, rule)
            read(x.now, 0, x.block, x.query, x.decays, x.outputs, x.scratch, rule)
            expect(v, strides[2], b, head, index, done + n, following, dv)
            transpose(x.outputs[L - 1, : rule.pads[L]], x.rows[2])
            if rule.residual:
                for i in range(n):
                    for f in range(dv):
                        x.rows[2, i, f] += x.rows[0, i, f]
            scatter(x.rows[2], b, head, here, y)
            if kept.shape[0] > 0:
                keep_hidden(x.block, 0, x.outputs, hidden[part], rule)
            advance(x.now, x.now, 0, x.block, n, x.decays, x.scratch, rule)
            done, part = done + n, part + 1
        chunk, filled = chunk + 1, 0
        if chunk % rule.stride == 0:
            flush(x.now, rule)
    store_state(x.now, final, rule)
    if done and (tokens.position[b] + done) % rule.chunk == 0:
        store_state(x.now, final_start, rule)


@njit(**OPTIONS)
def forward(tokens, rule, state, start, y, final, final_start, kept, hidden, first, last):
    """state, final [G, 2, size]; start, final_start [G, 1, size]; y [B, T, H, dv], zero at pads.

    kept [G, segments, 2, size], the states at segment starts, and hidden [G, blocks, rows, n] are for the backward."""
    x, H = buffers_of(state, rule, y.shape[1]), y.shape[2]
    for task in range(first, last):
        walk(
            tokens, rule, state[task], start[task], x, y, final[task], final_start[task], kept[task], hidden[task],
            task // H, task % H,
        )  # fmt: skip
