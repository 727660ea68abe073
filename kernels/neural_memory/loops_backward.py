"""The backward of `loops.py`: segments of chunks from the last to the first, each replayed from its first state.

Names as there and in `backward.py`; d_ before a name is the gradient of the outer loss.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.neural_memory.elements import (
    UNCOUNTED,
    activate_with_slope,
    copy,
    differentiate,
    multiply,
    scale_columns,
)
from memzoo.kernels.neural_memory.loops import (
    advance,
    blocks_of,
    clip_scales,
    complete,
    decay,
    decays_of,
    drop_small,
    states_of,
)
from memzoo.kernels.neural_memory.rows import (
    add,
    aligned,
    expect,
    flush,
    gather,
    load_state,
    normalize,
    normalize_backward,
    pick,
    real_tokens,
    scatter,
    store_state,
)
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS
from memzoo.kernels.tiles import add_product, mix_add, product, scale_add, transpose

# Gradients of a segment's h and delta [slots, L, P, block] and of the gates [slots, block].
Grads = namedtuple("Grads", "h delta keep eta w")
# Gradients of a block's decays: of a, b, e, P and E after i tokens.
DecayGrads = namedtuple("DecayGrads", "a b e P E")
Scratch = namedtuple("Scratch", "x rows slope d_r W S both attention sums")


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
        aligned(like, 4 * n, n).reshape((4, n, n)), np.zeros((2, n), like.dtype),
    )  # fmt: skip


@njit(fastmath=FAST, **UNCOUNTED)
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
    more, rows = states_of(like, rule, 3), aligned(like, 3 * n, P).reshape((3, n, P))
    at = np.zeros((2, slots), np.int64)
    return Buffers(
        blocks_of(like, rule, slots, False), decays_of(like, rule), grads_of(like, rule, slots),
        DecayGrads(sums[0], sums[1], sums[2], squares[0], squares[1]), scratch_of(like, rule),
        Places(at[0], at[1], np.zeros(rule.stride + 1, np.int64)), states_of(like, rule, slots), more[0], more[1],
        more[2], aligned(like, P, n).reshape((P, n)), rows[0], rows[1], rows[2],
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
            for i in range(3):
                pick(tokens.gates[i, b, head], here, x.gates[i, s])
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
    """Through the gradients that block s was made of, taken at weights; d_gates [3, T]."""
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
        d_gates[0, here[i]] = x.grads.keep[s, i]
        d_gates[1, here[i]] = x.grads.eta[s, i]
        d_gates[2, here[i]] = x.grads.w[s, i]


@njit(fastmath=FAST, **UNCOUNTED)
def walk(
    tokens, rule, x, start, kept, hidden, d_y, d_strides, d_final, d_final_start,
    d_q, d_k, d_v, d_gates, d_state, d_start, b, head,
):  # fmt: skip
    """One head of one row: `backward` for a task, arrays of states without the first axis."""
    per_chunk, zero, one = (rule.chunk + rule.block - 1) // rule.block, kept.dtype.type(0), kept.dtype.type(1)
    index, filled = x.index[: real_tokens(tokens.mask, b, x.index)], tokens.position[b]
    load_state(d_final, x.d_now, zero, rule)
    load_state(start, x.begin, zero, rule)
    x.d_begin[:] = 0
    chunks = (filled + len(index) + rule.chunk - 1) // rule.chunk if len(index) else 0
    owner = chunks if (filled + len(index)) % rule.chunk == 0 else chunks - 1  # whose start is final_start
    if chunks == 0:
        load_state(d_final_start, x.d_begin, zero, rule)
    elif owner == chunks:
        load_state(d_final_start, x.d_now, one, rule)
    for segment in range((chunks - 1) // rule.stride, -1, -1):
        c0, c1 = segment * rule.stride, min((segment + 1) * rule.stride, chunks)
        load_state(kept[segment], x.history[0], zero, rule)
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
                load_state(d_final_start, x.d_now if c else x.d_begin, one, rule)
            if c and rule.detach_every and c % rule.detach_every == 0:
                x.d_now[:] = 0
        flush(x.d_now, rule)
    store_state(x.d_now, d_state, rule)
    store_state(x.d_begin, d_start, rule)


@njit(**OPTIONS)
def backward(
    tokens, rule, start, kept, hidden, d_y, d_strides, d_final, d_final_start,
    d_q, d_k, d_v, d_gates, d_state, d_start, first, last,
):  # fmt: skip
    """Gradients of the tokens, zero at pads, of the first state and of `start`; shapes as in `forward`."""
    x, H = buffers_of(kept, rule, d_q.shape[1]), d_q.shape[2]
    for task in range(first, last):
        b, head = task // H, task % H
        walk(
            tokens, rule, x, start[task], kept[task], hidden[task], d_y, d_strides, d_final[task], d_final_start[task],
            d_q, d_k, d_v, d_gates[:, b, head], d_state[task], d_start[task], b, head,
        )  # fmt: skip
