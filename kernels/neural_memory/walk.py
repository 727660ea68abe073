"""The neural memory as a compiled CPU loop: one task walks one head of one row with its state in the cache."""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.addresses import flat
from memzoo.kernels.compiled import FAST, OPTIONS, UNCOUNTED
from memzoo.kernels.denormals import FLUSH, rounding_mode, set_rounding_mode
from memzoo.kernels.neural_memory.buffers import blocks_of, decays_of, states_of, tokens_of
from memzoo.kernels.neural_memory.elements import copy
from memzoo.kernels.neural_memory.loops import advance, complete, decay, keep_hidden, read, surprise
from memzoo.kernels.neural_memory.rows import (
    expect,
    flush,
    gather,
    keep_state,
    load_state,
    normalize,
    pick,
    real_tokens,
    room,
    scatter,
    store_state,
)
from memzoo.kernels.regions import run
from memzoo.kernels.tiles import prefetch, transpose

Buffers = namedtuple("Buffers", "block decays chunk now outputs scratch target query rows gates inverse index")


@njit(**OPTIONS)
def buffers_of(like, rule, T):
    """What `forward` works in."""
    L, P, n = len(rule.widths) - 1, rule.pads.max(), rule.block
    tall = max(P, n)  # one of them holds attention
    tiles = room(like, (L + 5) * tall, n, rule).reshape((L + 5, tall, n))
    states = states_of(like, rule, 2)
    return Buffers(
        blocks_of(like, rule, 1, True), decays_of(like, rule), states[0], states[1], tiles[5:], tiles[:3], tiles[3],
        tiles[4], room(like, 3 * n, P, rule).reshape((3, n, P)), np.zeros((3, n), like.dtype),
        np.empty(n, like.dtype), np.empty(T, np.int64),
    )  # fmt: skip


@njit(fastmath=FAST, **UNCOUNTED)
def load_gates(tokens, b, head, here, gates):
    """keep, eta and theta of a block, [3, block]."""
    pick(tokens.alpha, tokens.strides[3], b, head, here, gates[0])
    pick(tokens.eta, tokens.strides[4], b, head, here, gates[1])
    pick(tokens.theta, tokens.strides[5], b, head, here, gates[2])
    one = gates.dtype.type(1)
    for i in range(len(here)):
        gates[0, i] = one - gates[0, i]


@njit(fastmath=FAST, **UNCOUNTED)
def load_block(tokens, b, head, here, x, rule):
    """The block's queries, keys and values as columns, and its gates."""
    q, k, v, strides = tokens.q, tokens.k, tokens.v, tokens.strides
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
    load_gates(tokens, b, head, here, x.gates)


@njit(fastmath=FAST, **UNCOUNTED)
def walk(tokens, rule, matrices, x, y, kept, hidden, b, head):
    """One head of one row: `forward` for a task, with kept and hidden of that task."""
    q, k, v, strides = tokens.q, tokens.k, tokens.v, tokens.strides
    T, H, dv = y.shape[1:]
    L, dk = len(rule.widths) - 1, rule.widths[0]
    per_chunk = (rule.chunk + rule.block - 1) // rule.block
    index = x.index[: real_tokens(tokens.mask, b, x.index)]
    load_state(matrices[:2], b, head, False, rule, x.now)
    load_state(matrices[2:3], b, head, False, rule, x.chunk)
    done, chunk, filled = 0, 0, tokens.position[b]
    while done < len(index):
        stop = min(done + rule.chunk - filled, len(index))
        if chunk:
            for l in range(L):
                copy(x.now[l, 0], x.chunk[l, 0])
        if kept.shape[0] > 0 and chunk % rule.stride == 0 and chunk:
            keep_state(x.now, rule, kept[chunk // rule.stride - 1])
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
            if hidden.shape[0] > 0:
                keep_hidden(x.block, 0, x.outputs, hidden[part], rule)
            advance(x.now, x.now, 0, x.block, n, x.decays, x.scratch, rule)
            done, part = done + n, part + 1
        chunk, filled = chunk + 1, 0
        if chunk % rule.stride == 0:
            flush(x.now, rule)
    store_state(x.now, matrices[3:5], b, head, rule)
    full = done > 0 and (tokens.position[b] + done) % rule.chunk == 0
    store_state(x.now if full else x.chunk, matrices[5:6], b, head, rule)


@njit(**OPTIONS)
def forward(part, parts, places, matrices, mask, position, kept, hidden, shape, rule):
    """One of `parts` equal parts of the heads of all rows. shape: B, T, H. Strides in numbers.

    places [7, 4]: q, k, v, alpha, eta, theta and y [B, T, H, dv], contiguous and zero at pads, with their strides over
    B, T and H. matrices [6, L, 3]: W, S and start before and after, with their strides over B and H. For the backward
    are kept [G, segments - 1, 2, size], the states at the starts of the later segments, and hidden [G, blocks, rows,
    n]. mask [B, T] or empty."""
    B, T, H = shape
    tokens = tokens_of(places, mask, position, rule)
    x, y = buffers_of(tokens.q, rule, T), flat(places[6, 0], rule.tiny)[: B * T * H * rule.widths[-1]]
    y = y.reshape((B, T, H, rule.widths[-1]))
    mode = rounding_mode()
    set_rounding_mode(mode | FLUSH)
    for task in range(B * H * part // parts, B * H * (part + 1) // parts):
        walk(tokens, rule, matrices, x, y, kept[task], hidden[task], task // H, task % H)
    set_rounding_mode(mode)


@njit(**OPTIONS)
def forward_region(threads, arguments):
    """All parts, on that many threads."""
    run(forward, threads, arguments)
