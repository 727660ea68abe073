"""What goes into the loops of the neural memory and comes out of them: rows of tokens, and flat states.

A token's part of a head is one row of d contiguous numbers, far from the next token's.
"""

import numpy as np
from numba import njit

from memzoo.kernels.neural_memory.elements import UNCOUNTED
from memzoo.kernels.selective_scan.fused_kernels import FAST, OPTIONS
from memzoo.kernels.tiles import prefetch


@njit(**OPTIONS)
def aligned(like, rows, columns):
    """Zeros [rows, columns] from a multiple of 64 bytes on: vectors then never straddle two cache lines."""
    size = rows * columns
    raw = np.zeros(size + 64 // like.itemsize, like.dtype)
    first = (-raw.ctypes.data % 64) // like.itemsize
    return raw[first : first + size]


@njit(**UNCOUNTED)
def real_tokens(mask, b, index):
    """Write the indices of the tokens of row b that are no pads to the start of index [T]; returns how many."""
    n = 0
    for t in range(len(index)):
        if mask.shape[0] == 0 or mask[b, t]:
            index[n] = t
            n += 1
    return n


@njit(**UNCOUNTED)
def pick(x, index, out):
    """out[i] = x[index[i]]."""
    for i in range(len(index)):
        out[i] = x[index[i]]


@njit(**UNCOUNTED)
def gather(x, strides, b, h, index, d, rows):
    """rows [n, P] = x[b, t, h] for t in index, zero beyond."""
    n = len(index)
    for i in range(n):
        at = b * strides[0] + index[i] * strides[1] + h * strides[2]
        row, out = x[at : at + d], rows[i]
        for f in range(d):
            out[f] = row[f]
    rows[n:] = 0


@njit(**UNCOUNTED)
def scatter(rows, b, h, index, out):
    """out[b, t, h] for t in index: the rows, one after the other."""
    for i in range(len(index)):
        row, to = rows[i], out[b, index[i], h]
        for f in range(out.shape[3]):
            to[f] = row[f]


@njit(**UNCOUNTED)
def expect(x, strides, b, h, index, first, last, d):
    """Prefetch x[b, t, h] for t in index[first:last]: rows are too far apart for the processor to guess."""
    for i in range(max(first, 0), min(last, len(index))):
        prefetch(x, b * strides[0] + index[i] * strides[1] + h * strides[2], d)


@njit(fastmath=FAST, **UNCOUNTED)
def normalize(rows, inverse, n, rule):
    """The first n rows to unit length, in place; inverse keeps what they were multiplied by."""
    if rule.normalize:
        one, least, width = rows.dtype.type(1), rows.dtype.type(1e-12), rule.pads[0]
        for i in range(n):
            row, square = rows[i, :width], rows.dtype.type(0)
            for f in range(width):
                square += row[f] * row[f]
            scale = one / max(np.sqrt(square), least)
            inverse[i] = scale
            for f in range(width):
                row[f] *= scale


@njit(fastmath=FAST, **UNCOUNTED)
def normalize_backward(rows, inverse, d_rows, n, rule):
    """d_rows, the gradient of n unit rows, becomes that of the rows before `normalize`."""
    if rule.normalize:
        width = rule.pads[0]
        for i in range(n):
            row, grad, scale, along = rows[i, :width], d_rows[i, :width], inverse[i], rows.dtype.type(0)
            for f in range(width):
                along += row[f] * grad[f]
            if scale >= rows.dtype.type(1e12):
                along = rows.dtype.type(0)  # shorter than 1e-12: only scaled
            along *= scale
            for f in range(width):
                grad[f] = scale * grad[f] - along * row[f]


@njit(fastmath=FAST, **UNCOUNTED)
def add(rows, factor, out):
    for i in range(out.shape[0]):
        for f in range(out.shape[1]):
            out[i, f] += factor * rows[i, f]


@njit(**UNCOUNTED)
def load_state(flat, state, keep, rule):
    """state [L, 2, P, P + PAD] = keep state + flat [2 or 1, size]; without S in flat only W."""
    at = 0
    for l in range(len(rule.widths) - 1):
        out, width = rule.widths[l + 1], rule.widths[l]
        for part in range(flat.shape[0]):
            for o in range(out):
                row, new = state[l, part, o], flat[part, at + o * width : at + (o + 1) * width]
                for i in range(width):
                    row[i] = keep * row[i] + new[i]
        at += out * width


@njit(**UNCOUNTED)
def store_state(state, flat, rule):
    at = 0
    for l in range(len(rule.widths) - 1):
        out, width = rule.widths[l + 1], rule.widths[l]
        for part in range(flat.shape[0]):
            for o in range(out):
                row, to = state[l, part, o], flat[part, at + o * width : at + (o + 1) * width]
                for i in range(width):
                    to[i] = row[i]
        at += out * width


@njit(fastmath=FAST, **UNCOUNTED)
def flush(state, rule):
    """Zero what changes no sum, before it becomes denormal: see `coefficients.py`."""
    for l in range(len(rule.widths) - 1):
        for part in range(2):
            for o in range(rule.widths[l + 1]):
                row = state[l, part, o]
                for i in range(rule.widths[l]):
                    row[i] = row[i] if abs(row[i]) > rule.tiny else row.dtype.type(0)
