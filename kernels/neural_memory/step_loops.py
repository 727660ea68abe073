"""One token of the neural memory as a compiled CPU loop: W and S are read once and written once."""

import numpy as np
from numba import njit

from memzoo.kernels.addresses import flat
from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.denormals import FLUSH, rounding_mode, set_rounding_mode
from memzoo.kernels.neural_memory.elements import activate, copy, differentiate
from memzoo.kernels.regions import run


@njit(fastmath=FAST, **OPTIONS)
def _square(x):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return total


@njit(fastmath=FAST, **OPTIONS)
def _apply(matrix, x, out):
    for o in range(matrix.shape[0]):
        total = x.dtype.type(0)
        for i in range(matrix.shape[1]):
            total += matrix[o, i] * x[i]
        out[o] = total


@njit(fastmath=FAST, **OPTIONS)
def _copy(x, scale, out):
    for i in range(x.shape[0]):
        out[i] = scale * x[i]


@njit(fastmath=FAST, **OPTIONS)
def _write(W, S, h, delta, x, keep, eta, step, own_write, W_after, S_after, out):
    """S = eta S - step delta h', W = keep W + S, and out = W x with the new or the old W."""
    for o in range(W.shape[0]):
        total, change = x.dtype.type(0), step * delta[o]
        for i in range(W.shape[1]):
            momentum = eta * S[o, i] - change * h[i]
            weight = keep * W[o, i] + momentum
            S_after[o, i], W_after[o, i] = momentum, weight
            total += (weight if own_write else W[o, i]) * x[i]
        out[o] = total


@njit(**OPTIONS)
def _matrix(place, b, head, rule, l):
    """The matrix of layer l at `place`, an address and strides over B and H."""
    out, width, at = rule.widths[l + 1], rule.widths[l], b * place[1] + head * place[2]
    return flat(place[0], rule.tiny)[at : at + out * width].reshape((out, width))


@njit(**OPTIONS)
def _row(place, b, head, rule, d):
    """d numbers of the only token at `place`, an address and strides over B, T and H."""
    at = b * place[1] + head * place[3]
    return flat(place[0], rule.tiny)[at : at + d]


@njit(fastmath=FAST, **OPTIONS)
def step(part, parts, places, matrices, mask, shape, rule):
    """One of `parts` equal parts of the heads of all rows. shape: B, H.

    places [7, 4]: q, k, v, alpha, eta, theta and y; matrices [5, L, 3]: W, S and start, W and S after the token;
    strides as in `walk.py`. mask [B, 1] or empty."""
    H, L, dk, dv = shape[1], len(rule.widths) - 1, rule.widths[0], rule.widths[-1]
    like, wide = flat(places[0, 0], rule.tiny), rule.widths.max()
    h, delta = np.empty((L + 1, wide), like.dtype), np.empty((L, wide), like.dtype)
    hidden = np.empty((3, L, 1, wide), like.dtype)
    z, slope, bend = hidden[0], hidden[1], hidden[2]
    x, out = np.empty((1, wide), like.dtype), np.empty((1, wide), like.dtype)
    zero, one, least = like.dtype.type(0), like.dtype.type(1), like.dtype.type(1e-12)
    mode = rounding_mode()
    set_rounding_mode(mode | FLUSH)
    for task in range(shape[0] * H * part // parts, shape[0] * H * (part + 1) // parts):
        b, head = task // H, task % H
        y = _row(places[6], b, head, rule, dv)
        if mask.shape[0] > 0 and not mask[b, 0]:
            y[:] = 0
            for l in range(L):
                for group in range(2):
                    before = _matrix(matrices[group, l], b, head, rule, l)
                    copy(before, _matrix(matrices[3 + group, l], b, head, rule, l))
            continue
        query, key, value = (
            _row(places[0], b, head, rule, dk),
            _row(places[1], b, head, rule, dk),
            _row(places[2], b, head, rule, dv),
        )
        _copy(query, one / max(np.sqrt(_square(query)), least) if rule.normalize else one, x[0])
        _copy(key, one / max(np.sqrt(_square(key)), least) if rule.normalize else one, h[0])
        for i in range(dv):
            y[i] = x[0, i] if rule.residual else zero
        for l in range(L):
            d = rule.widths[l + 1]
            _apply(_matrix(matrices[2, l], b, head, rule, l), h[l], z[l, 0])
            if l < L - 1:
                differentiate(rule.kind, z[l, :, :d], h[l + 1 : l + 2], slope[l], bend[l])
        error = delta[L - 1, :dv]
        for i in range(dv):
            error[i] = z[L - 1, 0, i] - value[i] + (h[0, i] if rule.residual else zero)
        for l in range(L - 1, 0, -1):
            matrix = _matrix(matrices[2, l], b, head, rule, l)
            d = matrix.shape[1]
            delta[l - 1, :d] = 0
            for o in range(matrix.shape[0]):
                for i in range(d):
                    delta[l - 1, i] += delta[l, o] * matrix[o, i]
            for i in range(d):
                delta[l - 1, i] *= slope[l - 1, 0, i]
        keep, eta = one - _row(places[3], b, head, rule, 1)[0], _row(places[4], b, head, rule, 1)[0]
        size = _row(places[5], b, head, rule, 1)[0]
        if rule.clip > 0:
            square = zero
            for l in range(L):
                square += _square(delta[l, : rule.widths[l + 1]]) * _square(h[l, : rule.widths[l]])
            if square > rule.clip * rule.clip:
                size *= rule.clip / np.sqrt(square)
        if rule.threshold > 0 and _square(error) < rule.threshold:
            size = zero
        for l in range(L):
            _write(
                _matrix(matrices[0, l], b, head, rule, l), _matrix(matrices[1, l], b, head, rule, l), h[l], delta[l],
                x[0], keep, eta, size, rule.own_write, _matrix(matrices[3, l], b, head, rule, l),
                _matrix(matrices[4, l], b, head, rule, l), out[0],
            )  # fmt: skip
            if l < L - 1:
                activate(rule.kind, out[:, : rule.widths[l + 1]], x)
        for i in range(dv):
            y[i] += out[0, i]
    set_rounding_mode(mode)


@njit(**OPTIONS)
def step_all(threads, arguments, position, after):
    """All heads of all rows; `after` becomes the tokens in the chunk. Returns how many rows filled theirs."""
    mask, shape, rule = arguments[2:]
    if threads > 1:
        run(step, threads, arguments)
    else:
        step(0, 1, *arguments)
    full = 0
    for b in range(shape[0]):
        at = position[b] + (1 if mask.shape[0] == 0 or mask[b, 0] else 0)
        full += at == rule.chunk
        after[b] = at
    return full
