"""The backward of `walk.py`: segments of chunks from the last to the first, each replayed from its first state."""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.addresses import flat
from memzoo.kernels.compiled import FAST, OPTIONS, UNCOUNTED
from memzoo.kernels.denormals import FLUSH, rounding_mode, set_rounding_mode
from memzoo.kernels.neural_memory.buffers import blocks_of, decays_of, states_of, tokens_of
from memzoo.kernels.neural_memory.loops import advance, complete, decay
from memzoo.kernels.neural_memory.loops_backward import (
    DecayGrads,
    decay_backward,
    grads_of,
    read_backward,
    recall,
    scratch_of,
    steps_backward,
    surprise_backward,
    update_backward,
)
from memzoo.kernels.neural_memory.rows import (
    add,
    expect,
    flush,
    gather,
    load_state,
    normalize,
    normalize_backward,
    real_tokens,
    recall_state,
    room,
    scatter,
    store_state,
)
from memzoo.kernels.neural_memory.walk import load_gates
from memzoo.kernels.regions import run
from memzoo.kernels.tiles import transpose

# Tokens of a block: where its first one is, how many; the first block of every chunk of the segment, and one past it.
Places = namedtuple("Places", "at length firsts")
# What `backward` works in; states at the starts of a segment's blocks, those of a chunk's gradients, and queries.
Buffers = namedtuple(
    "Buffers",
    "block decays grads d_decays scratch places history begin d_begin d_now query queries d_reads d_rows gates "
    "inverse index",
)


@njit(**OPTIONS)
def buffers_of(like, rule, T):
    P, n, per_chunk = rule.pads.max(), rule.block, (rule.chunk + rule.block - 1) // rule.block
    slots = rule.stride * per_chunk
    sums, squares = np.zeros((3, n + 1), like.dtype), np.zeros((2, n + 1, n), like.dtype)
    more, rows = states_of(like, rule, 3), room(like, 3 * n, P, rule).reshape((3, n, P))
    at = np.zeros((2, slots), np.int64)
    return Buffers(
        blocks_of(like, rule, slots, False), decays_of(like, rule), grads_of(like, rule, slots),
        DecayGrads(sums[0], sums[1], sums[2], squares[0], squares[1]), scratch_of(like, rule),
        Places(at[0], at[1], np.zeros(rule.stride + 1, np.int64)), states_of(like, rule, slots), more[0], more[1],
        more[2], room(like, P, n, rule), rows[0], rows[1], rows[2],
        np.zeros((3, slots, n), like.dtype), np.empty((slots + 1, n), like.dtype), np.empty(T, np.int64),
    )  # fmt: skip


@njit(fastmath=FAST, **UNCOUNTED)
def replay(tokens, rule, x, hidden, b, head, index, c0, c1):
    """The blocks of the chunks c0 to c1, and the states at their starts; returns how many blocks."""
    filled, per_chunk, s = tokens.position[b], (rule.chunk + rule.block - 1) // rule.block, 0
    for c in range(c0, c1):
        t, stop = max(c * rule.chunk - filled, 0), min((c + 1) * rule.chunk - filled, len(index))
        x.places.firsts[c - c0], part = s, c * per_chunk
        while t < stop:
            here = index[t : min(t + rule.block, stop)]
            n, keys = len(here), x.block.rows[s, 0]
            x.places.at[s], x.places.length[s] = t, n
            gather(tokens.k, tokens.strides[1], b, head, here, rule.widths[0], keys)
            normalize(keys, x.inverse[s], n, rule)
            transpose(keys[:, : rule.pads[0]], x.block.h[s, 0])
            load_gates(tokens, b, head, here, x.gates[:, s])
            recall(x.block, s, hidden[part], rule)
            complete(x.block, s, x.gates[2, s], n, rule)
            t, part = t + n, part + 1
            if t < stop or c + 1 < c1:
                decay(x.gates[0, s], x.gates[1, s], x.block.w[s], n, x.decays, rule)
                advance(x.history[s], x.history[s + 1], s, x.block, n, x.decays, x.scratch.both, rule)
            s += 1
    x.places.firsts[c1 - c0] = s
    return s


@njit(fastmath=FAST, **UNCOUNTED)
def block_backward(tokens, rule, x, hidden, d_y, d_strides, d_q, b, head, index, s):
    """Through the reads and the update of block s; hidden is what was kept of it."""
    q, strides, dk, dv = tokens.q, tokens.strides, rule.widths[0], rule.widths[-1]
    at, n = x.places.at[s], x.places.length[s]
    here, span = index[at : at + n], len(x.places.at) * rule.block  # tokens of a segment, or more
    gather(q, strides[0], b, head, here, dk, x.queries)
    gather(d_y, d_strides, b, head, here, dv, x.d_reads)
    expect(q, strides[0], b, head, index, at - rule.block, at, dk)
    normalize(x.queries, x.inverse[-1], n, rule)
    transpose(x.queries[:, : rule.pads[0]], x.query)
    transpose(x.d_reads[:, : rule.pads[-1]], x.scratch.d_r)
    decay(x.gates[0, s], x.gates[1, s], x.block.w[s], n, x.decays, rule)
    x.d_decays.a[:], x.d_decays.b[:], x.d_decays.e[:] = 0, 0, 0
    x.d_decays.P[:], x.d_decays.E[:] = 0, 0
    update_backward(x.history[s], x.d_now, s, x.block, n, x.decays, x.grads, x.d_decays, x.scratch, rule)
    expect(d_y, d_strides, b, head, index, at - rule.block, at, dv)
    read_backward(
        x.history[s], x.d_now, s, x.block, x.query, x.queries, n, hidden, x.decays, x.grads, x.d_decays, x.scratch,
        rule,
    )  # fmt: skip
    expect(tokens.k, strides[1], b, head, index, at - span, at - span + n, dk)
    decay_backward(x.gates[0, s], x.gates[1, s], s, n, x.decays, x.d_decays, x.grads)
    transpose(x.scratch.d_r[: rule.pads[0]], x.d_rows)
    if rule.residual:
        add(x.d_reads, 1, x.d_rows)
    normalize_backward(x.queries, x.inverse[-1], x.d_rows, n, rule)
    scatter(x.d_rows, b, head, here, d_q)


@njit(fastmath=FAST, **UNCOUNTED)
def surprises_backward(rule, x, weights, d_weights, d_k, d_v, d_gates, b, head, index, s):
    """Through the gradients that block s was made of, taken at weights; d_gates [3, B, H, T]."""
    at, n, last = x.places.at[s], x.places.length[s], len(rule.widths) - 2
    here = index[at : at + n]
    steps_backward(x.gates[2, s], s, n, x.block, x.grads, rule)
    surprise_backward(weights, d_weights, s, x.block, x.grads, x.scratch, rule)
    transpose(x.grads.delta[s, last, : rule.pads[last + 1]], x.d_reads)
    for i in range(rule.block):
        for f in range(x.d_reads.shape[1]):
            x.d_reads[i, f] = -x.d_reads[i, f]
    scatter(x.d_reads, b, head, here, d_v)
    transpose(x.grads.h[s, 0, : rule.pads[0]], x.d_rows)
    if rule.residual:
        add(x.d_reads, -1, x.d_rows)
    normalize_backward(x.block.rows[s, 0], x.inverse[s], x.d_rows, n, rule)
    scatter(x.d_rows, b, head, here, d_k)
    for i in range(n):
        d_gates[0, b, head, here[i]] = -x.grads.keep[s, i]
        d_gates[1, b, head, here[i]] = x.grads.eta[s, i]
        d_gates[2, b, head, here[i]] = x.grads.w[s, i]


@njit(fastmath=FAST, **UNCOUNTED)
def walk(tokens, rule, matrices, x, kept, hidden, d_y, d_strides, d_q, d_k, d_v, d_gates, b, head):
    """One head of one row: `backward` for a task, with kept and hidden of that task."""
    per_chunk, d_final_start = (rule.chunk + rule.block - 1) // rule.block, matrices[5:6]
    index, filled = x.index[: real_tokens(tokens.mask, b, x.index)], tokens.position[b]
    load_state(matrices[3:5], b, head, False, rule, x.d_now)
    load_state(matrices[2:3], b, head, False, rule, x.begin)
    x.d_begin[:] = 0
    chunks = (filled + len(index) + rule.chunk - 1) // rule.chunk if len(index) else 0
    owner = chunks if (filled + len(index)) % rule.chunk == 0 else chunks - 1  # whose start is the final start
    if chunks == 0:
        load_state(d_final_start, b, head, False, rule, x.d_begin)
    elif owner == chunks:
        load_state(d_final_start, b, head, True, rule, x.d_now)
    for segment in range((chunks - 1) // rule.stride, -1, -1):
        c0, c1 = segment * rule.stride, min((segment + 1) * rule.stride, chunks)
        if segment:
            recall_state(kept[segment - 1], rule, x.history[0])
        else:
            load_state(matrices[:2], b, head, False, rule, x.history[0])
        blocks = replay(tokens, rule, x, hidden, b, head, index, c0, c1)
        x.grads.h[:blocks] = 0
        x.grads.delta[:blocks] = 0
        x.grads.w[:blocks] = 0
        for c in range(c1 - 1, c0 - 1, -1):
            begin, end = x.places.firsts[c - c0], x.places.firsts[c - c0 + 1]
            for s in range(end - 1, begin - 1, -1):
                block_backward(
                    tokens, rule, x, hidden[c * per_chunk + s - begin], d_y, d_strides, d_q, b, head, index, s
                )
            weights = x.history[begin][:, 0] if c else x.begin[:, 0]
            d_weights = x.d_now[:, 0] if c else x.d_begin[:, 0]
            for s in range(begin, end):
                surprises_backward(rule, x, weights, d_weights, d_k, d_v, d_gates, b, head, index, s)
            if c == owner:
                load_state(d_final_start, b, head, True, rule, x.d_now if c else x.d_begin)
            if c and rule.detach_every and c % rule.detach_every == 0:
                x.d_now[:] = 0
        flush(x.d_now, rule)
    if matrices[8, 0, 0] == 0:  # the gradients were taken at W itself
        for l in range(len(rule.widths) - 1):
            add(x.d_begin[l, 0], 1, x.d_now[l, 0])
    store_state(x.d_now, matrices[6:8], b, head, rule)
    store_state(x.d_begin, matrices[8:9], b, head, rule)


@njit(**OPTIONS)
def backward(part, parts, places, matrices, mask, position, kept, hidden, shape, rule):
    """Gradients of the tokens, zero at pads, and of the matrices; arguments as in `forward`.

    places [11, 4]: after the tokens' six d_y and, contiguous, d_q, d_k, d_v [B, T, H, d] and the gates' gradients
    [3, B, H, T]. matrices [9, L, 3]: W, S and start, the gradients of those after the call and, to be written, of
    those before it. Without addresses, gradients are zero or, to be written, not wanted: then start is W."""
    B, T, H = shape
    tokens = tokens_of(places, mask, position, rule)
    x, rows, dk, dv = buffers_of(tokens.q, rule, T), B * T * H, rule.widths[0], rule.widths[-1]
    d_y = flat(places[6, 0], rule.tiny)
    d_q = flat(places[7, 0], rule.tiny)[: rows * dk].reshape((B, T, H, dk))
    d_k = flat(places[8, 0], rule.tiny)[: rows * dk].reshape((B, T, H, dk))
    d_v = flat(places[9, 0], rule.tiny)[: rows * dv].reshape((B, T, H, dv))
    d_gates = flat(places[10, 0], rule.tiny)[: 3 * rows].reshape((3, B, H, T))
    mode = rounding_mode()
    set_rounding_mode(mode | FLUSH)
    for task in range(B * H * part // parts, B * H * (part + 1) // parts):
        walk(
            tokens, rule, matrices, x, kept[task], hidden[task], d_y, places[6, 1:], d_q, d_k, d_v, d_gates,
            task // H, task % H,
        )  # fmt: skip
    set_rounding_mode(mode)


@njit(**OPTIONS)
def backward_region(threads, arguments):
    """All parts, on that many threads."""
    run(backward, threads, arguments)
