"""Bank attention as compiled CPU loops: tiles of queries that read the same chapter, and what they read.

Keys are rows and queries columns of a tile of logits, so that the bank is read in place: only the tile's queries are
transposed. Pairs of a token and a chapter are sorted by chapter; the rows of a pair are the query heads that share its
key head. The shared chapters come last, as one more chapter that every token reads. What a token reads is summed in
the order of its chapters, by arithmetic that is the same wherever its rows are in a tile and whatever others read.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.bank_attention.vectors import LOG2_E, exponentials, gather_rows, largest, mix_row, scale_row
from memzoo.kernels.compiled import OPTIONS
from memzoo.kernels.selective_scan.elementwise import exp
from memzoo.kernels.tiles import PAD, SUMS, VECTOR, Ahead, aligned, product_ahead

ROWS = 64  # of a tile
KEYS = 256  # whose logits are held at once
NEAR = 8192  # numbers of the values that stay in the first cache beside their logits
LN2 = 1 / LOG2_E

# Pairs sorted by chapter, then by token: token, place among the n S slots (-1: a shared chapter), log2 of the weight.
# Those of chapter c whose token is in part p of the tokens: begin[c parts + p] to the next one. `group` of the `heads`
# query heads share a key head.
Plan = namedtuple("Plan", "token pair weight begin parts heads group chapters size shared")
# One tile: rows and their transposes, logits, what is read; per row where it begins in q, its place in [n, H] and its
# sorted pair; maxima, sums and factors; what comes from memory during products with keys and with values.
Tile = namedtuple("Tile", "rows columns logits read at place pair row with_keys with_values")


@njit(**OPTIONS)
def sort_pairs(chapters, log_weights, bank, heads, kv_heads, parts):
    """chapters, log_weights [n, S]; bank: how many keys, in a chapter and shared by all. A counting sort."""
    (n, S), (N, size, shared) = chapters.shape, bank
    C = N // size
    begin = np.zeros((C + 1) * parts + 1, np.int64)
    for t in range(n):
        part = t * parts // n
        for s in range(S):
            c = chapters[t, s]
            if c >= C:
                raise ValueError("bank_attention: a chapter's number is not below the number of chapters")
            if c >= 0:
                begin[c * parts + part + 1] += 1
        if shared > 0:
            begin[C * parts + part + 1] += 1
    for i in range(len(begin) - 1):
        begin[i + 1] += begin[i]
    token, pair = np.empty(begin[-1], np.int64), np.empty(begin[-1], np.int64)
    weight, place = np.empty(begin[-1], log_weights.dtype), begin[:-1].copy()
    for t in range(n):
        for s in range(S + 1 if shared > 0 else S):
            c = C if s == S else chapters[t, s]
            if c >= 0:
                bucket = c * parts + t * parts // n
                at = place[bucket]
                place[bucket] += 1
                token[at], pair[at], weight[at] = t, -1, 0
                if s < S:
                    pair[at], weight[at] = t * S + s, log_weights[t, s] * LOG2_E
    return Plan(token, pair, weight, begin, parts, heads, heads // kv_heads, C, size, shared)


@njit(**OPTIONS)
def logits_of(like, keys):
    """Rows of logits farther apart than they are long: else they would compete for the same places in a cache."""
    return aligned(like, keys, ROWS + PAD)[:, :ROWS]


@njit(**OPTIONS)
def _tile(like, d):
    places, addresses, states = (
        np.empty((3, ROWS), np.int64),
        np.empty((2, ROWS), np.int64),
        np.zeros((2, 6), np.int64),
    )
    return Tile(
        aligned(like, ROWS, d), aligned(like, d, ROWS), logits_of(like, KEYS), aligned(like, ROWS, d),
        places[0], places[1], places[2], aligned(like, 6, ROWS),
        Ahead(addresses[0], states[0]), Ahead(addresses[1], states[1]),
    )  # fmt: skip


@njit(**OPTIONS)
def padded(count):
    return (count + PAD - 1) // PAD * PAD


@njit(**OPTIONS)
def spare_rows(like, rows, d, plan):
    """What `whole_rows` may need."""
    return aligned(like, rows if plan.size % PAD else 0, d)


@njit(**OPTIONS)
def whole_rows(x, start, stop, spare):
    """x[start:stop], or a copy of it with zero rows after the last where their number is not what products want."""
    count = stop - start
    if count % PAD == 0:
        return x[start:stop]
    spare[:count] = x[start:stop]
    spare[count : padded(count)] = 0
    return spare[: padded(count)]


@njit(**OPTIONS)
def rows_for(count, d, itemsize):
    """Rows of a product of at least `count` and d columns: tiles.py wants fewer where columns fill its widest."""
    step = SUMS // 4 if d % (4 * VECTOR // itemsize) == 0 else PAD
    return (count + step - 1) // step * step


@njit(**OPTIONS)
def _near(d):
    """Keys whose values are read at once."""
    return max(NEAR // d // PAD * PAD, PAD)


@njit(**OPTIONS)
def keys_of(plan, c):
    """The first key of a chapter and the one after its last."""
    if c == plan.chapters:
        return 0, plan.shared
    return c * plan.size, (c + 1) * plan.size


@njit(**OPTIONS)
def place_rows(tile, plan, pairs, first, last, h):
    """Which the rows are: `first` to `last` of those of the sorted pairs from `pairs` on. Returns how many vectors
    want; those beyond the last are copies of the first, which nobody reads."""
    d, g = tile.rows.shape[1], plan.group
    j, i = pairs + first // g, first % g
    for r in range(last - first):
        place = plan.token[j] * plan.heads + h * g + i
        tile.at[r], tile.place[r], tile.pair[r] = place * d, place, j
        i += 1
        if i == g:
            i, j = 0, j + 1
    width = padded(last - first)
    tile.at[last - first : width] = tile.at[0]
    return width


@njit(**OPTIONS)
def _cut(plan, pairs, first, last):
    """Where a tile of rows from `first` on ends at the latest: a token that chose a chapter twice reads it in turn."""
    for j in range(pairs + first // plan.group + 1, pairs + (last - 1) // plan.group + 1):
        if plan.token[j] == plan.token[j - 1]:
            return (j - pairs) * plan.group
    return last


@njit(**OPTIONS)
def _spread(ahead, x, row, rows, count, tiles, terms):
    """Over so many tiles of products, of so many terms: `rows` of x [*, d] from `row` on, `count` of ahead.rows."""
    length, state, tiles = x.shape[1] * x.itemsize, ahead.state, max(tiles, 1)
    state[0], state[1] = x.ctypes.data + row * length, (rows * length + tiles * terms - 1) // (tiles * terms)
    state[2], state[3], state[4], state[5] = 0, count, (count + tiles - 1) // tiles, length


@njit(**OPTIONS)
def _expect(tile, plan, bucket, at, to, width, h, q, k, v, out):
    """Plan to fetch what this tile's end and the next tile need: rows that the processor cannot guess, and the next
    chapter, in equal parts with the tiles of this one. Memory takes about as long as the products meanwhile."""
    d, size, g, parts, last = q.shape[2], q.itemsize, plan.group, plan.parts, len(plan.begin) - 1
    pairs, rows = plan.begin[bucket], (plan.begin[bucket + 1] - plan.begin[bucket]) * g
    following = bucket + parts
    while following < last and plan.begin[following] == plan.begin[following + 1]:
        following += parts
    base = out.ctypes.data
    for r in range(to - at):
        tile.with_keys.rows[r] = base + tile.at[r] * size
    j, i = (pairs + to // g, to % g) if to < rows else (plan.begin[min(following, last)], 0)
    count, base = 0, q.ctypes.data + h * g * d * size
    while count < ROWS and j < len(plan.token):
        tile.with_values.rows[count] = base + (plan.token[j] * plan.heads + i) * d * size
        count, i = count + 1, i + 1
        if i == g:
            i, j = 0, j + 1
    row = coming = 0
    if following < last - parts:
        row, coming = plan.size * at // rows, plan.size * to // rows - plan.size * at // rows
        row += h * k.shape[1] + following // parts * plan.size
    start, stop = keys_of(plan, bucket // parts)
    sums, terms = SUMS * VECTOR // size, min(_near(d), stop - start)
    tiles = rows_for(to - at, d, size) * d // sums * ((stop - start + terms - 1) // terms)
    _spread(tile.with_keys, k.reshape(-1, d), row, coming, to - at, padded(stop - start) * width // sums, d)
    _spread(tile.with_values, v.reshape(-1, d), row, coming, count, tiles, terms)


@njit(fastmath={"contract"}, **OPTIONS)
def _rescale(tile, count, old, top, sums):
    """What was summed relative to the old maxima, to the new ones."""
    flat, d = tile.read.reshape(-1), tile.read.shape[1]
    for r in range(ROWS):
        old[r] = exp((old[r] - top[r]) * old.dtype.type(LN2))
    for r in range(ROWS):
        sums[r] *= old[r]
    for r in range(count):
        scale_row(flat, r * d, flat, r * d, d, old[r], old[r])


@njit(**OPTIONS)
def _read(tile, count, width, k, v, start, stop, spare):
    """Keys `start` to `stop`, KEYS at a time: row[0] the largest logit, in base 2; relative to it row[1] the sum of
    the exponentials, and tile.read that of exponentials times values."""
    top, sums, old, new = tile.row[0], tile.row[1], tile.row[2], tile.row[3]
    zero, one, rows = top.dtype.type(0), top.dtype.type(1), rows_for(count, v.shape[1], v.itemsize)
    logits, read, near = tile.logits[:, :width], tile.read[:rows], _near(v.shape[1])
    top[:], sums[:] = -np.inf, 0
    for a in range(start, stop, KEYS):
        b = min(a + KEYS, stop)
        keys = whole_rows(k, a, b, spare)
        product_ahead(logits[: padded(b - a)], zero, logits, keys, tile.columns[:, :width], tile.with_keys)
        new[:width] = -np.inf
        largest(logits, b - a, new)
        for r in range(ROWS):
            old[r] = top[r]
            top[r] = max(top[r], new[r] * new.dtype.type(LOG2_E))
        if a > start:
            _rescale(tile, rows, old, top, sums)
        exponentials(logits, b - a, top, sums)
        for i in range(a, b, near):
            j = min(i + near, b)
            e = logits[i - a : j - a, :rows].T
            product_ahead(read, zero if i == start else one, read, e, v[i:j], tile.with_values)


@njit(fastmath={"contract"}, **OPTIONS)
def _merge(tile, count, weight, joint, out, top, sums):
    """Add what the tile's rows read to their tokens' output, which is kept normalised: by sums 2^top if joint."""
    real, ln2, d = tile.row.dtype.type, tile.row.dtype.type(LN2), tile.read.shape[1]
    own_top, own_sums, before, total, keep, take = tile.row
    for r in range(count):
        before[r], total[r], take[r] = top[tile.place[r]], sums[tile.place[r]], weight[tile.pair[r]]
    if joint:
        for r in range(ROWS):
            take[r] += own_top[r]
            own_top[r] = max(before[r], take[r])
        for r in range(ROWS):
            base = own_top[r] if own_top[r] > -np.inf else real(0)
            keep[r] = total[r] * exp((before[r] - base) * ln2)
            take[r] = exp((take[r] - base) * ln2) if take[r] > -np.inf else real(0)
        for r in range(ROWS):
            total[r] = keep[r] + own_sums[r] * take[r]
            norm = total[r] if total[r] > 0 else real(1)
            keep[r] /= norm
            take[r] /= norm
    else:
        for r in range(ROWS):
            keep[r], total[r] = total[r], real(1)
            take[r] = exp(take[r] * ln2) / own_sums[r]
    read = tile.read.reshape(-1)
    for r in range(count):
        top[tile.place[r]], sums[tile.place[r]] = own_top[r], total[r]
        if keep[r] == 0:  # perhaps nothing has been written there
            scale_row(out, tile.at[r], read, r * d, d, take[r], take[r])
        else:
            mix_row(out, tile.at[r], read, r * d, d, keep[r], take[r])


@njit(**OPTIONS)
def forward(q, k, v, plan, joint, scale, out, top, sums, first, last):
    """q [n, H, d], out the same, flat; k, v [Hk, N, d]; top from -inf and sums from 0 on, both [n H]: a token's sum of
    exponentials will be sums 2^top. Rows that read nothing stay as they are. Task h parts + p: a key head, a part."""
    d, parts = q.shape[2], plan.parts
    tile, spare, flat = _tile(q, d), spare_rows(q, KEYS, d, plan), q.reshape(-1)
    scales = np.full(ROWS, scale, q.dtype)
    for task in range(first, last):
        h, p = task // parts, task % parts
        for c in range(plan.chapters + 1):
            bucket, at = c * parts + p, 0
            start, stop = keys_of(plan, c)
            pairs = plan.begin[bucket]
            rows = (plan.begin[bucket + 1] - pairs) * plan.group
            while at < rows:
                to = _cut(plan, pairs, at, min(at + ROWS, rows))
                width = place_rows(tile, plan, pairs, at, to, h)
                gather_rows(flat, tile.at, scales, width, tile.rows, tile.columns)
                _expect(tile, plan, bucket, at, to, width, h, q, k, v, out)
                _read(tile, to - at, width, k[h], v[h], start, stop, spare)
                _merge(tile, to - at, plan.weight, joint, out, top, sums)
                at = to
