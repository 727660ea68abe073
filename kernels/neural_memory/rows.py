"""What goes into the loops of the neural memory and comes out of them: rows of tokens, and states.

A token's part of a head is one row of d contiguous numbers, far from the next token's. `places` says where tensors
are: the address and the strides of each, as in `arguments.py`.
"""

import numpy as np
from numba import njit

from memzoo.kernels.addresses import flat
from memzoo.kernels.compiled import FAST, OPTIONS, UNCOUNTED
from memzoo.kernels.tiles import aligned, prefetch


@njit(**OPTIONS)
def room(like, rows, columns, rule):
    """An aligned array [rows, columns], of zeros where the rule has paddings, which have to be: else whatever is read
    was written before."""
    out = aligned(like, rows, columns)
    if rule.padded:
        out[:] = 0
    return out


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
def pick(x, strides, b, h, index, out):
    """out[i] = x[b, index[i], h]."""
    for i in range(len(index)):
        out[i] = x[b * strides[0] + index[i] * strides[1] + h * strides[2]]


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
def load_matrix(x, more, rule, l, state):
    """The real part of state [P, P + PAD] = x, or += x if more."""
    width = rule.widths[l]
    for o in range(rule.widths[l + 1]):
        row, new = state[o], x[o * width : (o + 1) * width]
        for i in range(width):
            row[i] = row[i] + new[i] if more else new[i]


@njit(**UNCOUNTED)
def store_matrix(state, rule, l, x):
    width = rule.widths[l]
    for o in range(rule.widths[l + 1]):
        row, to = state[o], x[o * width : (o + 1) * width]
        for i in range(width):
            to[i] = row[i]


@njit(**UNCOUNTED)
def load_state(places, b, h, more, rule, state):
    """state [L, 2, P, P + PAD] from matrices at places [2, L, 3], W and S, or only W; 0 where there is no address."""
    for part in range(places.shape[0]):
        for l in range(places.shape[1]):
            there = places[part, l]
            if there[0] != 0:
                at = b * there[1] + h * there[2]
                load_matrix(flat(there[0], rule.tiny)[at:], more, rule, l, state[l, part])
            elif not more:
                state[l, part] = 0


@njit(**UNCOUNTED)
def store_state(state, places, b, h, rule):
    """The inverse, without addition; what has no address is dropped."""
    for part in range(places.shape[0]):
        for l in range(places.shape[1]):
            there = places[part, l]
            if there[0] != 0:
                at = b * there[1] + h * there[2]
                store_matrix(state[l, part], rule, l, flat(there[0], rule.tiny)[at:])


@njit(**UNCOUNTED)
def recall_state(kept, rule, state):
    """A state from kept [2, size], where its matrices lie one after the other."""
    at = 0
    for l in range(len(rule.widths) - 1):
        for part in range(2):
            load_matrix(kept[part, at:], False, rule, l, state[l, part])
        at += rule.widths[l] * rule.widths[l + 1]


@njit(**UNCOUNTED)
def keep_state(state, rule, kept):
    at = 0
    for l in range(len(rule.widths) - 1):
        for part in range(2):
            store_matrix(state[l, part], rule, l, kept[part, at:])
        at += rule.widths[l] * rule.widths[l + 1]


@njit(fastmath=FAST, **UNCOUNTED)
def flush(state, rule):
    """Zero what changes no sum, before it becomes denormal: see `coefficients.py`."""
    for l in range(len(rule.widths) - 1):
        for part in range(2):
            for o in range(rule.widths[l + 1]):
                row = state[l, part, o]
                for i in range(rule.widths[l]):
                    row[i] = row[i] if abs(row[i]) > rule.tiny else row.dtype.type(0)
