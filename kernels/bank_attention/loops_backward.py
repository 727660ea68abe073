"""The gradient of bank attention as compiled CPU loops: blocks of keys, and tiles of the rows that read them.

The letters and tiles of loops.py. With G the gradient of what is read and P = exp(l - norm), dP = V G',
dS = P (dP - delta), dV = P G, dK = dS Q and dQ = dS' K: five products, the logits computed again. All readers of a
block follow one another, so no two tasks add to the same key.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.bank_attention.loops import (
    LN2,
    ROWS,
    keys_of,
    logits_of,
    padded,
    place_rows,
    rows_for,
    spare_rows,
    whole_rows,
)
from memzoo.kernels.bank_attention.vectors import LOG2_E, exponentials, gather_rows, largest, mix_row, products, slopes
from memzoo.kernels.compiled import OPTIONS
from memzoo.kernels.selective_scan.elementwise import exp
from memzoo.kernels.tiles import add_product, aligned, product

BLOCK = 512  # keys whose gradients are summed before the next ones
NEAR = 128  # keys whose logits are held at once

# One tile: queries and gradients of what they read, each with its transpose; P and dS; the gradient of the queries;
# places as in loops.py; per row norm, delta, the sum of dS and what else is needed.
Tile = namedtuple("Tile", "rows columns grads turned p s d_rows at place pair row")
# q, grad [n H d]; norm, log2, and delta, [n H] or for separate softmaxes [pairs H]
Rows = namedtuple("Rows", "q grad norm delta")
Block = namedtuple("Block", "k v dk dv keys")


@njit(**OPTIONS)
def _tile(like, d):
    places = np.empty((3, ROWS), np.int64)
    return Tile(
        aligned(like, ROWS, d), aligned(like, d, ROWS), aligned(like, ROWS, d), aligned(like, d, ROWS),
        logits_of(like, NEAR), logits_of(like, NEAR), aligned(like, ROWS, d),
        places[0], places[1], places[2], aligned(like, 6, ROWS),
    )  # fmt: skip


@njit(**OPTIONS)
def _load(tile, plan, pairs, first, last, h, q, grad, joint, scale):
    """Queries times scale; gradients of what they read, of a separate softmax times the pair's weight."""
    width, factors = place_rows(tile, plan, pairs, first, last, h), tile.row[0]
    factors[:] = scale
    gather_rows(q, tile.at, factors, width, tile.rows, tile.columns)
    factors[:] = 1
    if not joint:
        for r in range(last - first):
            factors[r] = exp(plan.weight[tile.pair[r]] * factors.dtype.type(LN2))
    gather_rows(grad, tile.at, factors, width, tile.grads, tile.turned)
    return width


@njit(**OPTIONS)
def _softmaxes(tile, width, k, v, start, stop, spare):
    """row[0] the log2 of the rows' sums of exponentials, row[1] the sums of P dP."""
    top, delta, sums, old, new = tile.row[0], tile.row[1], tile.row[2], tile.row[3], tile.row[4]
    log2_e, ln2 = top.dtype.type(LOG2_E), top.dtype.type(LN2)
    p, s = tile.p[:, :width], tile.s[:, :width]
    top[:], sums[:], delta[:] = -np.inf, 0, 0
    for a in range(start, stop, NEAR):
        b = min(a + NEAR, stop)
        product(p[: padded(b - a)], whole_rows(k, a, b, spare), tile.columns[:, :width])
        product(s[: padded(b - a)], whole_rows(v, a, b, spare), tile.turned[:, :width])
        new[:width] = -np.inf
        largest(p, b - a, new)
        for r in range(width):
            old[r] = top[r]
            top[r] = max(top[r], new[r] * log2_e)
            factor = exp((old[r] - top[r]) * ln2)
            sums[r] *= factor
            delta[r] *= factor
        exponentials(p, b - a, top, sums)
        products(p, s, b - a, delta)
    for r in range(width):
        delta[r] /= sums[r]
        top[r] += np.log2(sums[r])


@njit(**OPTIONS)
def separate(q, grad, k, v, plan, scale, norm, delta, first, last):
    """`norm` and `delta` [pairs H] of separate softmaxes, for `backward`. Tasks as in `forward`."""
    parts, g = plan.parts, plan.group
    tile, spare = _tile(k, k.shape[2]), spare_rows(k, NEAR, k.shape[2], plan)
    for task in range(first, last):
        h, p = task // parts, task % parts
        for c in range(plan.chapters + 1):
            pairs, stop = plan.begin[c * parts + p], plan.begin[c * parts + p + 1]
            a, b = keys_of(plan, c)
            for at in range(0, (stop - pairs) * g, ROWS):
                to = min(at + ROWS, (stop - pairs) * g)
                width = _load(tile, plan, pairs, at, to, h, q, grad, False, scale)
                _softmaxes(tile, width, k[h], v[h], a, b, spare)
                for r in range(to - at):
                    place = tile.pair[r] * plan.heads + tile.place[r] % plan.heads
                    norm[place], delta[place] = tile.row[0, r], tile.row[1, r]


@njit(**OPTIONS)
def _norms(tile, plan, rows, count, joint):
    """row[0] and row[1]: `norm`, less the pair's weight in a joint softmax, and `delta`."""
    for r in range(count):
        j = tile.pair[r]
        if joint:
            weight, place = plan.weight[j], tile.place[r]
            tile.row[0, r] = rows.norm[place] - weight if weight > -np.inf else np.inf
        else:
            place = j * plan.heads + tile.place[r] % plan.heads
            tile.row[0, r] = rows.norm[place]
        tile.row[1, r] = rows.delta[place]
    tile.row[0, count:], tile.row[1, count:] = 0, 0


@njit(**OPTIONS)
def _add_tile(tile, count, width, block):
    """The rows' share of the block's gradients; theirs from the block in tile.d_rows, the sums of dS in row[2]."""
    norm, delta, along, sums = tile.row[0], tile.row[1], tile.row[2], tile.row[3]
    rows = rows_for(count, block.k.shape[1], block.k.itemsize)
    along[:], sums[:] = 0, 0
    for a in range(0, block.keys, NEAR):
        b = min(a + NEAR, block.keys)
        whole = a + padded(b - a)
        p, s = tile.p[: whole - a, :width], tile.s[: whole - a, :width]
        product(p, block.k[a:whole], tile.columns[:, :width])
        product(s, block.v[a:whole], tile.turned[:, :width])
        exponentials(p, b - a, norm, sums)
        slopes(s, p, b - a, delta, along)
        add_product(block.dv[a:whole], p[:, :count], tile.grads[:count])
        add_product(block.dk[a:whole], s[:, :count], tile.rows[:count])
        turned = s[: b - a, :rows].T
        if a == 0:
            product(tile.d_rows[:rows], turned, block.k[a:b])
        else:
            add_product(tile.d_rows[:rows], turned, block.k[a:b])


@njit(**OPTIONS)
def _add_readers(tile, plan, pairs, stop, h, rows, joint, scale, block, dq, dw):
    """All rows of the sorted pairs `pairs` to `stop` against a block of keys."""
    d, flat, one = tile.rows.shape[1], tile.d_rows.reshape(-1), tile.row.dtype.type(1)
    for at in range(0, (stop - pairs) * plan.group, ROWS):
        to = min(at + ROWS, (stop - pairs) * plan.group)
        width = _load(tile, plan, pairs, at, to, h, rows.q, rows.grad, joint, scale)
        _norms(tile, plan, rows, to - at, joint)
        _add_tile(tile, to - at, width, block)
        for r in range(to - at):
            mix_row(dq, tile.at[r], flat, r * d, d, one, scale)
            pair = plan.pair[tile.pair[r]]
            if pair >= 0:
                dw[pair] += tile.row[2, r]


@njit(**OPTIONS)
def backward(q, grad, k, v, plan, joint, scale, norm, delta, dq, dk, dv, dw, first, last):
    """q, grad [n H d]; norm and delta as in `Rows`; from 0 on dq [parts, n H d], dk, dv [Hk, N, d], and of joint
    softmaxes dw [Hk parts, n S]. Task h parts + p: a key head, a part of the keys with about as many readers."""
    parts, C, d = plan.parts, plan.chapters, k.shape[2]
    tile, spare = _tile(k, d), spare_rows(k, 4 * BLOCK, d, plan).reshape((4, -1, d))
    scale, rows = k.dtype.type(scale), Rows(q, grad, norm, delta)
    everyone, end = plan.begin[C * parts], plan.begin[-1]
    total = everyone * plan.size + (end - everyone) * plan.shared
    for task in range(first, last):
        h, p, done = task // parts, task % parts, 0
        for c in range(C):
            pairs, stop = plan.begin[c * parts], plan.begin[(c + 1) * parts]
            shared = c * plan.size < plan.shared
            readers = stop - pairs + (end - everyone if shared else 0)
            for a in range(c * plan.size, (c + 1) * plan.size, BLOCK):
                b = min(a + BLOCK, (c + 1) * plan.size)
                mine = readers > 0 and total * p // parts <= done < total * (p + 1) // parts
                done += readers * (b - a)
                if not mine:
                    continue
                in_place = (b - a) == padded(b - a)
                to_k, to_v = dk[h, a:b], dv[h, a:b]
                if not in_place:
                    spare[2:] = 0
                    to_k, to_v = spare[2, : padded(b - a)], spare[3, : padded(b - a)]
                block = Block(whole_rows(k[h], a, b, spare[0]), whole_rows(v[h], a, b, spare[1]), to_k, to_v, b - a)
                _add_readers(tile, plan, pairs, stop, h, rows, joint, scale, block, dq[p], dw[task])
                if shared:
                    _add_readers(tile, plan, everyone, end, h, rows, joint, scale, block, dq[p], dw[task])
                if not in_place:
                    dk[h, a:b], dv[h, a:b] = to_k[: b - a], to_v[: b - a]
