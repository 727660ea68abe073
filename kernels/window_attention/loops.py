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

from memzoo.kernels.neural_memory.rows import aligned
from memzoo.kernels.selective_scan.elementwise import exp
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS
from memzoo.kernels.tiles import PAD, add_product, product, transpose

BLOCK = 32  # queries
SPAN = 256  # queries whose keys are gathered at once

# q [B, T, H, d], k, v [B, L, Hkv, d], prefixes of both [B, P, Hkv, d], all flat, and their strides [5, 3] over the
# first three axes; first [B], the tokens before which there are no keys; window in tokens, `per` keys a token.
Inputs = namedtuple("Inputs", "q k v prefix_k prefix_v strides first window per prefix scale")
# Keys and values of a span, as rows [columns, D] and turned [D, columns]; gradients only in the backward.
Span = namedtuple("Span", "k v k_turned v_turned d_k d_v")


@njit(**OPTIONS)
def padded(n):
    return (n + PAD - 1) // PAD * PAD


@njit(**OPTIONS)
def matrix(like, rows, columns):
    return aligned(like, rows, columns).reshape((rows, columns))


@njit(**OPTIONS)
def span_of(x, T, D, grads):
    columns = padded(x.prefix) + padded((min(SPAN, T) + x.window) * x.per) + 2 * PAD
    if columns * x.q.itemsize % 1024 == 0:
        columns += PAD  # rows of such a length share few sets of the cache
    more = columns if grads else 0
    return Span(
        matrix(x.q, columns, D), matrix(x.q, columns, D), matrix(x.q, D, columns),
        matrix(x.q, D if grads else 0, columns), matrix(x.q, more, D), matrix(x.q, more, D),
    )  # fmt: skip


@njit(**OPTIONS)
def gather(x, stride, b, first, count, h, rows, d):
    """rows[i, :d] = x[b, first + i, h]."""
    at = b * stride[0] + first * stride[1] + h * stride[2]
    for i in range(count):
        row, out = x[at : at + d], rows[i]
        for f in range(d):
            out[f] = row[f]
        at += stride[1]


@njit(**OPTIONS)
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


@njit(**OPTIONS)
def load_queries(x, stride, b, t, n, h, rows, d):
    gather(x, stride, b, t, n, h, rows, d)
    rows[n:] = 0


@njit(**OPTIONS)
def columns_of(x, past, b, t, n, first):
    """A block's columns of the span that starts at key `first`: from a multiple of PAD, and how many."""
    begin = padded(x.prefix)
    low = begin + max(x.first[b], past + t - x.window + 1) * x.per - first
    high = begin + (past + t + n) * x.per - first
    low = low // PAD * PAD
    return low, padded(high - low)


@njit(fastmath=FAST, **OPTIONS)
def scores(x, span, queries, low, width, out):
    """out[:, : prefix] and the block's columns behind it."""
    begin = padded(x.prefix)
    if begin > 0:
        product(out[:, :begin], queries, span.k_turned[:, :begin])
    product(out[:, begin : begin + width], queries, span.k_turned[:, low : low + width])


@njit(**OPTIONS)
def hide(x, row, begin, left, right, end, value):
    """Columns that a query does not see."""
    row[x.prefix : begin] = value
    row[begin:left] = value
    row[right:end] = value


@njit(**OPTIONS)
def seen_by(x, past, b, t, first, low):
    """The columns of a block's scores that query t sees, besides the prefix."""
    left = max(x.first[b], past + t - x.window + 1) * x.per - first
    right = (past + t + 1) * x.per - first
    begin = padded(x.prefix)
    return 2 * begin + left - low, 2 * begin + right - low


@njit(fastmath=FAST, **OPTIONS)
def largest(row, lanes):
    """The largest number; the lanes are what makes it vector instructions."""
    lanes[:] = row[:PAD]
    for j in range(PAD, len(row), PAD):
        part = row[j : j + PAD]
        for i in range(PAD):
            lanes[i] = part[i] if part[i] > lanes[i] else lanes[i]
    most = lanes[0]
    for i in range(1, PAD):
        most = max(most, lanes[i])
    return most


@njit(fastmath=FAST, **OPTIONS)
def exponentials(row, shift):
    """exp(row - shift) in place, and their sum."""
    total = row.dtype.type(0)
    for j in range(len(row)):
        value = exp(row[j] - shift)
        row[j] = value
        total += value
    return total


@njit(fastmath=FAST, **OPTIONS)
def dot(x, y):
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit(fastmath=FAST, **OPTIONS)
def scale_rows(x, factor):
    for i in range(x.shape[0]):
        for f in range(x.shape[1]):
            x[i, f] *= factor


@njit(fastmath=FAST, **OPTIONS)
def forward(x, heads, y, sums, T, L, spans, first, last):
    """y [B, T, H, d] and sums [B, H, T], the logarithms of the sums of a query's exponentials.

    A task is a span of a head of keys in a row."""
    H, d = y.shape[2:]
    past, groups, D, begin = L // x.per - T, H // heads, padded(d), padded(x.prefix)
    span = span_of(x, T, D, False)
    queries, reads = matrix(x.q, BLOCK, D), matrix(x.q, BLOCK, D)
    weights, lanes = matrix(x.q, BLOCK, begin + len(span.k)), np.empty(PAD, x.q.dtype)
    lowest = x.q.dtype.type(-1e30)
    for task in range(first, last):
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
                for i in range(n):
                    row = weights[i, :end]
                    left, right = seen_by(x, past, b, t + i, key, low)
                    hide(x, row, begin, left, right, end, lowest)
                    most = largest(row, lanes)
                    total = exponentials(row, most)
                    hide(x, row, begin, left, right, end, x.q.dtype.type(0))
                    sums[b, h, t + i] = most + np.log(total)
                    lanes[0] = x.q.dtype.type(1) / total
                    for j in range(end):
                        row[j] *= lanes[0]
                weights[n:, :end] = 0
                product(reads, weights[:, begin:end], span.v[low : low + width])
                if begin > 0:
                    add_product(reads, weights[:, :begin], span.v[:begin])
                for i in range(n):
                    for f in range(d):
                        y[b, t + i, h, f] = reads[i, f]


@njit(**OPTIONS)
def add_rows(rows, b, first, count, h, out):
    for i in range(count):
        for f in range(out.shape[3]):
            out[b, first + i, h, f] += rows[i, f]


@njit(fastmath=FAST, **OPTIONS)
def backward(x, y, y_strides, sums, d_y, d_y_strides, d_q, d_k, d_v, d_prefix_k, d_prefix_v, first, last):
    """d_q [B, T, H, d]; d_k, d_v [B, L, Hkv, d] and those of the prefix [B, P, Hkv, d] are zero and added to."""
    T, H, d = d_q.shape[1:]
    L, heads = d_k.shape[1:3]
    past, groups, D, begin = L // x.per - T, H // heads, padded(d), padded(x.prefix)
    span = span_of(x, T, D, True)
    queries, reads, grads, out = (
        matrix(x.q, BLOCK, D), matrix(x.q, BLOCK, D), matrix(x.q, BLOCK, D), matrix(x.q, BLOCK, D),
    )  # fmt: skip
    weights, slopes = matrix(x.q, BLOCK, begin + len(span.k)), matrix(x.q, BLOCK, begin + len(span.k))
    zero = x.q.dtype.type(0)
    for task in range(first, last):
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
                    load_queries(y, y_strides, b, t, n, h, reads, d)
                    load_queries(d_y, d_y_strides, b, t, n, h, grads, d)
                    scale_rows(queries, x.scale)
                    scores(x, span, queries, low, width, weights)
                    product(slopes[:, begin:end], grads, span.v_turned[:, low:high])
                    if begin > 0:
                        product(slopes[:, :begin], grads, span.v_turned[:, :begin])
                    for i in range(n):
                        row, slope = weights[i, :end], slopes[i, :end]
                        left, right = seen_by(x, past, b, t + i, key, low)
                        exponentials(row, sums[b, h, t + i])
                        hide(x, row, begin, left, right, end, zero)
                        mean = dot(reads[i], grads[i])
                        for j in range(end):
                            slope[j] = row[j] * (slope[j] - mean)
                    weights[n:, :end] = 0
                    slopes[n:, :end] = 0
                    product(out, slopes[:, begin:end], span.k[low:high])
                    add_product(span.d_k[low:high], slopes[:, begin:end].T, queries)
                    add_product(span.d_v[low:high], weights[:, begin:end].T, grads)
                    if begin > 0:
                        add_product(out, slopes[:, :begin], span.k[:begin])
                        add_product(span.d_k[:begin], slopes[:, :begin].T, queries)
                        add_product(span.d_v[:begin], weights[:, :begin].T, grads)
                    for i in range(n):
                        for f in range(d):
                            d_q[b, t + i, h, f] = x.scale * out[i, f]
            add_rows(span.d_k[begin:], b, key, count, g, d_k)
            add_rows(span.d_v[begin:], b, key, count, g, d_v)
            add_rows(span.d_k, b, 0, x.prefix, g, d_prefix_k)
            add_rows(span.d_v, b, 0, x.prefix, g, d_prefix_v)
