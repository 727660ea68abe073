"""Windowed attention as compiled CPU loops; a task is one head of keys in one row of the batch.

A task walks its tokens in spans whose keys and values stay in cache, turned once. A block of queries meets the keys
from its first token's window to its last token, rounded to whole vectors; the prefix comes before them. The backward
computes the weights again, from the logarithms of their sums.

Index legend: C queries in a block, columns are keys: those of the prefix, zeros up to a multiple of PAD, those of the
span. Everything beyond the real widths and tokens is 0.
"""

from collections import namedtuple

import numpy as np
from numba import njit
from numba.extending import intrinsic

from memzoo.kernels.addresses import flat
from memzoo.kernels.compiled import FAST, OPTIONS, UNCOUNTED
from memzoo.kernels.regions import run
from memzoo.kernels.selective_scan.elementwise import exp
from memzoo.kernels.tiles import PAD, add_product, aligned, product, transpose

BLOCK = 32  # queries
SPAN = 256  # queries whose keys are gathered at once

# q [B, T, H, d], k, v [B, L, Hkv, d], prefixes of both [B, P, Hkv, d], all flat, and their strides over the first
# three axes; first [B], the tokens before which there are no keys; window in tokens, `per` keys a token.
Inputs = namedtuple("Inputs", "q k v prefix_k prefix_v strides first window per prefix scale")
# Keys and values of a span, as rows [columns, D] and turned [D, columns]; gradients only in the backward.
Span = namedtuple("Span", "k v k_turned v_turned d_k d_v")


@njit(**OPTIONS)
def inputs_at(places, strides, options):
    first, window, per, prefix, scale = options
    q, k, v, prefix_k, prefix_v = (
        flat(places[0], scale), flat(places[1], scale), flat(places[2], scale), flat(places[3], scale),
        flat(places[4], scale),
    )  # fmt: skip
    return Inputs(q, k, v, prefix_k, prefix_v, strides, first, window, per, prefix, scale)


@njit(**UNCOUNTED)
def padded(n):
    return (n + PAD - 1) // PAD * PAD


@njit(**OPTIONS)
def zeros(like, rows, columns):
    out = aligned(like, rows, columns)
    out[:] = 0
    return out


@njit(**OPTIONS)
def span_of(x, T, D, grads):
    columns = padded(x.prefix) + padded((min(SPAN, T) + x.window) * x.per) + 2 * PAD
    if columns * x.q.itemsize % 1024 == 0:
        columns += PAD  # rows of such a length share few sets of the cache
    more = columns if grads else 0
    return Span(
        zeros(x.q, columns, D), zeros(x.q, columns, D), aligned(x.q, D, columns),
        aligned(x.q, D if grads else 0, columns), aligned(x.q, more, D), aligned(x.q, more, D),
    )  # fmt: skip


@njit(**UNCOUNTED)
def gather(x, stride, b, first, count, h, rows, d):
    """rows[i, :d] = x[b, first + i, h]."""
    at = b * stride[0] + first * stride[1] + h * stride[2]
    for i in range(count):
        row, out = x[at : at + d], rows[i]
        for f in range(d):
            out[f] = row[f]
        at += stride[1]


@njit(**UNCOUNTED)
def load_span(x, span, b, h, first, count, d, grads):
    """The prefix, and keys first..first + count of head h in row b."""
    begin, end = padded(x.prefix), padded(x.prefix) + count
    gather(x.prefix_k, x.strides[3], b, 0, x.prefix, h, span.k, d)
    gather(x.prefix_v, x.strides[4], b, 0, x.prefix, h, span.v, d)
    gather(x.k, x.strides[1], b, first, count, h, span.k[begin:], d)
    gather(x.v, x.strides[2], b, first, count, h, span.v[begin:], d)
    stop = min(padded(end) + PAD, len(span.k))
    span.k[end:stop] = 0
    span.v[end:stop] = 0
    transpose(span.k[:stop], span.k_turned)
    if grads:
        transpose(span.v[:stop], span.v_turned)
        span.d_k[:stop] = 0
        span.d_v[:stop] = 0


@njit(**UNCOUNTED)
def load_queries(x, stride, b, t, n, h, rows, d):
    gather(x, stride, b, t, n, h, rows, d)
    rows[n:] = 0


@njit(**UNCOUNTED)
def columns_of(x, past, b, t, n, first):
    """A block's columns of the span that starts at key `first`: from a multiple of PAD, and how many."""
    begin = padded(x.prefix)
    low = begin + max(x.first[b], past + t - x.window + 1) * x.per - first
    high = begin + (past + t + n) * x.per - first
    low = low // PAD * PAD
    return low, padded(high - low)


@njit(fastmath=FAST, **UNCOUNTED)
def scores(x, span, queries, low, width, out):
    """out[:, : prefix] and the block's columns behind it."""
    begin = padded(x.prefix)
    if begin > 0:
        product(out[:, :begin], queries, span.k_turned[:, :begin])
    product(out[:, begin : begin + width], queries, span.k_turned[:, low : low + width])


@njit(**UNCOUNTED)
def hide(x, row, begin, left, right, end, value):
    """Columns that a query does not see."""
    for j in range(x.prefix, left):
        row[j] = value
    for j in range(right, end):
        row[j] = value


@njit(**UNCOUNTED)
def seen_by(x, past, b, t, first, low):
    """The columns of a block's scores that query t sees, besides the prefix."""
    left = max(x.first[b], past + t - x.window + 1) * x.per - first
    right = (past + t + 1) * x.per - first
    begin = padded(x.prefix)
    return 2 * begin + left - low, 2 * begin + right - low


@intrinsic
def larger(_, x, y):
    """The larger of two numbers, any of them where one is NaN: of a plain comparison LLVM makes no vectors."""

    def generate(context, builder, signature, args):
        flags = ["nnan", "nsz"]
        return builder.select(builder.fcmp_ordered(">", *args, flags=flags), *args, flags=flags)

    return x(x, y), generate


@njit(**UNCOUNTED)
def largest(row):
    most = row[0]
    for j in range(len(row)):
        most = larger(row[j], most)
    return most


@njit(fastmath=FAST, **UNCOUNTED)
def exponentials(row, shift):
    """exp(row - shift) in place, and their sum."""
    total = row.dtype.type(0)
    for j in range(len(row)):
        value = exp(row[j] - shift)
        row[j] = value
        total += value
    return total


@njit(fastmath=FAST, **UNCOUNTED)
def dot(x, y):
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit(fastmath=FAST, **UNCOUNTED)
def scale_rows(x, factor):
    for i in range(x.shape[0]):
        for f in range(x.shape[1]):
            x[i, f] *= factor


@njit(fastmath=FAST, **UNCOUNTED)
def weigh(x, weights, past, b, t, n, key, low, end, sums):
    """The scores of queries t..t + n become weights; sums [n], the logarithms of the sums of their exponentials."""
    real, begin = x.q.dtype.type, padded(x.prefix)
    for i in range(n):
        row = weights[i, :end]
        left, right = seen_by(x, past, b, t + i, key, low)
        hide(x, row, begin, left, right, end, real(-1e30))
        most = largest(row)
        total = exponentials(row, most)
        hide(x, row, begin, left, right, end, real(0))
        sums[i] = most + np.log(total)
        factor = real(1) / total
        for j in range(end):
            row[j] *= factor
    weights[n:, :end] = 0


@njit(fastmath=FAST, **UNCOUNTED)
def differentiate(x, weights, slopes, reads, grads, past, b, t, n, key, low, end, sums):
    """Scores become weights, and slopes, the weights' gradients, those of the scores."""
    real, begin = x.q.dtype.type, padded(x.prefix)
    for i in range(n):
        row, slope = weights[i, :end], slopes[i, :end]
        left, right = seen_by(x, past, b, t + i, key, low)
        exponentials(row, sums[i])
        hide(x, row, begin, left, right, end, real(0))
        mean = dot(reads[i], grads[i])
        for j in range(end):
            slope[j] = row[j] * (slope[j] - mean)
    weights[n:, :end] = 0
    slopes[n:, :end] = 0


@njit(fastmath=FAST, **UNCOUNTED)
def store_queries(rows, factor, b, t, n, h, out):
    """out[b, t : t + n, h] = factor rows."""
    for i in range(n):
        row, to = rows[i], out[b, t + i, h]
        for f in range(len(to)):
            to[f] = factor * row[f]


@njit(fastmath=FAST, **OPTIONS)
def forward(part, parts, places, strides, options, sizes, y, sums):
    """y [B, T, H, d] and sums [B, H, T], the logarithms of the sums of a query's exponentials.

    places: addresses of the first five of `Inputs`, the rest of which are options; sizes: heads and number of keys.
    """
    x = inputs_at(places, strides, options)
    (B, T, H, d), (heads, L) = y.shape, sizes
    spans = (T + SPAN - 1) // SPAN
    tasks = B * heads * spans
    past, groups, D, begin = L // x.per - T, H // heads, padded(d), padded(x.prefix)
    span = span_of(x, T, D, False)
    queries, reads = zeros(x.q, BLOCK, D), aligned(x.q, BLOCK, D)
    weights, one = aligned(x.q, BLOCK, begin + len(span.k)), x.q.dtype.type(1)
    for task in range(tasks * part // parts, tasks * (part + 1) // parts):
        b, g, s = task // spans // heads, task // spans % heads, task % spans
        start, stop = s * SPAN, min((s + 1) * SPAN, T)
        key = max(x.first[b], past + start - x.window + 1) * x.per
        load_span(x, span, b, g, key, (past + stop) * x.per - key, d, False)
        for t in range(start, stop, BLOCK):
            n = min(BLOCK, stop - t)
            low, width = columns_of(x, past, b, t, n, key)
            end = begin + width
            for h in range(g * groups, (g + 1) * groups):
                load_queries(x.q, x.strides[0], b, t, n, h, queries, d)
                scale_rows(queries, x.scale)
                scores(x, span, queries, low, width, weights)
                weigh(x, weights, past, b, t, n, key, low, end, sums[b, h, t : t + n])
                product(reads, weights[:, begin:end], span.v[low : low + width])
                if begin > 0:
                    add_product(reads, weights[:, :begin], span.v[:begin])
                store_queries(reads, one, b, t, n, h, y)


@njit(**UNCOUNTED)
def add_rows(rows, b, first, count, h, out):
    for i in range(count):
        row, to = rows[i], out[b, first + i, h]
        for f in range(len(to)):
            to[f] += row[f]


@njit(fastmath=FAST, **OPTIONS)
def backward(part, parts, places, strides, options, sums, d_q, d_k, d_v, d_prefix_k, d_prefix_v):
    """d_q [B, T, H, d]; d_k, d_v [B, L, Hkv, d] and those of the prefix [B, P, Hkv, d] are zero and added to.

    places: as in `forward`, and those of y and its gradient."""
    x = inputs_at(places, strides, options)
    y, d_y = flat(places[5], x.scale), flat(places[6], x.scale)
    B, T, H, d = d_q.shape
    L, heads = d_k.shape[1:3]
    past, groups, D, begin = L // x.per - T, H // heads, padded(d), padded(x.prefix)
    span = span_of(x, T, D, True)
    queries, reads, grads, out = (
        zeros(x.q, BLOCK, D), zeros(x.q, BLOCK, D), zeros(x.q, BLOCK, D), aligned(x.q, BLOCK, D),
    )  # fmt: skip
    weights, slopes = aligned(x.q, BLOCK, begin + len(span.k)), aligned(x.q, BLOCK, begin + len(span.k))
    tasks = B * heads
    for task in range(tasks * part // parts, tasks * (part + 1) // parts):
        b, g = task // heads, task % heads
        for start in range(0, T, SPAN):
            stop = min(start + SPAN, T)
            key = max(x.first[b], past + start - x.window + 1) * x.per
            count = (past + stop) * x.per - key
            load_span(x, span, b, g, key, count, d, True)
            for t in range(start, stop, BLOCK):
                n = min(BLOCK, stop - t)
                low, width = columns_of(x, past, b, t, n, key)
                end, high = begin + width, low + width
                for h in range(g * groups, (g + 1) * groups):
                    load_queries(x.q, x.strides[0], b, t, n, h, queries, d)
                    load_queries(y, strides[5], b, t, n, h, reads, d)
                    load_queries(d_y, strides[6], b, t, n, h, grads, d)
                    scale_rows(queries, x.scale)
                    scores(x, span, queries, low, width, weights)
                    product(slopes[:, begin:end], grads, span.v_turned[:, low:high])
                    if begin > 0:
                        product(slopes[:, :begin], grads, span.v_turned[:, :begin])
                    own = sums[b, h, t : t + n]
                    differentiate(x, weights, slopes, reads, grads, past, b, t, n, key, low, end, own)
                    product(out, slopes[:, begin:end], span.k[low:high])
                    add_product(span.d_k[low:high], slopes[:, begin:end].T, queries)
                    add_product(span.d_v[low:high], weights[:, begin:end].T, grads)
                    if begin > 0:
                        add_product(out, slopes[:, :begin], span.k[:begin])
                        add_product(span.d_k[:begin], slopes[:, :begin].T, queries)
                        add_product(span.d_v[:begin], weights[:, :begin].T, grads)
                    store_queries(out, x.scale, b, t, n, h, d_q)
            add_rows(span.d_k[begin:], b, key, count, g, d_k)
            add_rows(span.d_v[begin:], b, key, count, g, d_v)
            add_rows(span.d_k, b, 0, x.prefix, g, d_prefix_k)
            add_rows(span.d_v, b, 0, x.prefix, g, d_prefix_v)


@njit(**OPTIONS)
def forward_region(threads, arguments):
    run(forward, threads, arguments)


@njit(**OPTIONS)
def backward_region(threads, arguments):
    run(backward, threads, arguments)
