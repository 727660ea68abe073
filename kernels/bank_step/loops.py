"""The loops of a step, compiled by numba, in three parallel regions: queries and the router's logits, the chapters (by
the loops of bank_attention), and what is read through the output's weights.

Handing an array over from Python takes as long as a tenth of the work, so a step gets addresses.
"""

import numpy as np
from numba import njit

from memzoo.kernels.addresses import flat
from memzoo.kernels.bank_attention.loops import forward, sort_pairs
from memzoo.kernels.compiled import FAST, OPTIONS
from memzoo.kernels.regions import run


@njit(**OPTIONS)
def _matrix(address, rows, columns, like):
    return flat(address, like)[: rows * columns].reshape((rows, columns))


@njit(**OPTIONS)
def _heads(address, heads, rows, columns, like):
    return _matrix(address, heads * rows, columns, like).reshape((heads, rows, columns))


@njit(fastmath=FAST, **OPTIONS)
def _dot(a, b):
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(**OPTIONS)
def _project(part, parts, x, factors, weight, bias, y):
    """A part's columns of y [n, E] = factor W x + bias, W [E, D]."""
    E = len(weight)
    for e in range(E * part // parts, E * (part + 1) // parts):
        for t in range(len(x)):
            y[t, e] = _dot(weight[e], x[t]) * factors[t]
            if len(bias) > 0:
                y[t, e] += bias[e]


@njit(**OPTIONS)
def _ask(part, parts, x, factors, query, gate, bias, q, logits):
    _project(part, parts, x, factors, query, bias[:0], q)
    _project(part, parts, x, factors, gate, bias, logits)


@njit(**OPTIONS)
def _read(part, parts, q, k, v, chapters, log_weights, size, scale, outs, tops, sums):
    """Every `parts`-th of the chapters that any token reads, with outs [P, n, E], tops and sums [P, n, H]."""
    n, S = chapters.shape
    own, used = np.full_like(chapters, -1), np.full(k.shape[1] // size, -1)
    count = 0
    for t in range(n):
        for j in range(S):
            c = chapters[t, j]
            if used[c] < 0:
                used[c] = count
                count += 1
            if used[c] % parts == part:
                own[t, j] = c
    plan = sort_pairs(own, log_weights, (k.shape[1], size, 0), tops.shape[2], len(k), 1)
    tops[part], sums[part] = -np.inf, 0
    rows, flat = q.reshape((n, tops.shape[2], k.shape[2])), outs[part].reshape(-1)
    forward(rows, k, v, plan, True, scale, flat, tops[part].reshape(-1), sums[part].reshape(-1), 0, len(k))


@njit(**OPTIONS)
def _tell(part, parts, outs, tops, sums, output, ones, y):
    """What the parts read, each normalised by its 2^top sums, as one; and its product with W_o."""
    P, n, H = tops.shape
    d, read = outs.shape[2] // H, np.zeros(outs.shape[1:], outs.dtype)
    for t in range(n):
        for h in range(H):
            top, total = tops[:, t, h].max(), outs.dtype.type(0)
            for p in range(P):
                total += sums[p, t, h] * np.exp2(tops[p, t, h] - top)
            for p in range(P):
                share = sums[p, t, h] * np.exp2(tops[p, t, h] - top) / total
                for i in range(h * d if share > 0 else h * d + d, h * d + d):  # a part that read nothing wrote nothing
                    read[t, i] += share * outs[p, t, i]
    _project(part, parts, read, ones, output, output[0, :0], y)


@njit(**OPTIONS)
def step(places, sizes, x, y, logits, n, threads, eps, scale):
    """Addresses: places of the weights, of x and y [n, D] and of logits [n, C]; sizes as in `BankStep`. eps < 0: no
    norm. scale: of the logits, in the type of the numbers."""
    D, E, C, heads, N, d, size, shared, top_k, normalize = sizes
    query, gate = _matrix(places[0], E, D, scale), _matrix(places[1], C, D, scale)
    bias, output = flat(places[2], scale)[:C], _matrix(places[5], D, E, scale)
    k, v = _heads(places[3], heads, N, d, scale), _heads(places[4], heads, N, d, scale)
    rows, result, scores = _matrix(x, n, D, scale), _matrix(y, n, D, scale), _matrix(logits, n, C, scale)
    _step(rows, query, gate, bias, k, v, output, result, scores, eps, size, shared, top_k, normalize, scale, threads)


@njit(**OPTIONS)
def _step(x, query, gate, bias, k, v, output, y, logits, eps, size, shared, top_k, normalize, scale, threads):
    """Chapters have `size` keys; the first `shared` of them are read by all."""
    n, E, H = len(x), len(query), len(query) // k.shape[2]
    factors, ones = np.ones(n, x.dtype), np.ones(n, x.dtype)
    for t in range(n if eps >= 0 else 0):
        factors[t] = 1 / np.sqrt(_dot(x[t], x[t]) / x.shape[1] + eps)
    q, chapters = np.empty((n, E), x.dtype), np.empty((n, shared + top_k), np.int64)
    log_weights, outs = np.zeros(chapters.shape, x.dtype), np.empty((threads, n, E), x.dtype)
    tops, sums = np.empty((threads, n, H), x.dtype), np.empty((threads, n, H), x.dtype)
    if threads > 1:
        run(_ask, threads, (x, factors, query, gate, bias, q, logits))
    else:
        _ask(0, 1, x, factors, query, gate, bias, q, logits)
    for t in range(n):
        chapters[t, :shared] = np.arange(shared)
        if top_k > 0:
            _choose(logits[t], normalize > 0, chapters[t, shared:], log_weights[t, shared:])
            chapters[t, shared:] += shared
    if threads > 1:
        run(_read, threads, (q, k, v, chapters, log_weights, size, scale, outs, tops, sums))
        run(_tell, threads, (outs, tops, sums, output, ones, y))
    else:
        _read(0, 1, q, k, v, chapters, log_weights, size, scale, outs, tops, sums)
        _tell(0, 1, outs, tops, sums, output, ones, y)


@njit(**OPTIONS)
def _choose(logits, normalize, chapters, log_weights):
    """The largest logits and their log-softmax, over themselves or over all."""
    chapters[:] = -1
    for j in range(len(chapters)):
        best = -1
        for c in range(len(logits)):
            if (best < 0 or logits[c] > logits[best]) and not np.any(chapters[:j] == c):
                best = c
        chapters[j], log_weights[j] = best, logits[best]
    largest, total = log_weights[0], 0.0
    for x in log_weights if normalize else logits:
        total += np.exp(x - largest)
    log_weights -= largest + np.log(total)
