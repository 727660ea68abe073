"""The linear memory on a GPU in Triton, a kernel for the whole sequence each way; imported only when it runs.

The rows of W and S never meet, but for the norm of a token's error: a program owns a group's `BLOCK_V` rows of both,
keeps them in registers, and walks the chunks with the equations of `chunked.py` and `backward.py` (one layer). A clip
or a threshold needs all rows in one program. The coefficients come from `coefficients.py`; what is saved is what
`backward.py` expects.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memzoo.kernels.neural_memory.coefficients import Coefficients, coefficients_backward

BLOCK_V = 16  # rows of W and S per program: with chunks of 16 nothing spills, with 64 the fewest registers (ptxas)
WIDEST = 64  # rows that one program can hold
STAGES = 1  # of the backward: loads ahead of their use do not fit into shared memory


@triton.jit
def steps(theta, delta, K, clip, threshold, CLIP: tl.constexpr, THRESHOLD: tl.constexpr):
    """The steps [C] after clip and threshold; squared norms of errors and keys, and what the clip scales by."""
    error, key = tl.sum(delta * delta, 1), tl.sum(K * K, 1)
    scale = theta * 0 + 1
    if CLIP:
        square = error * key
        scale = tl.where(square > clip * clip, clip / tl.sqrt(tl.maximum(square, clip * clip)), 1.0)
    if THRESHOLD:
        scale = tl.where(error >= threshold, scale, 0.0)
    return theta * scale, error, key, scale


@triton.jit
def forward_kernel(
    q, k, v, read, inside, end, theta, mix, state, start, ends, y, err, kept, final, final_start,
    N, G, dk, dv, size, clip, threshold, CLIP: tl.constexpr, THRESHOLD: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """q, k [N G, C, dk]; v, y, err [N G, C, dv]; read, end [N G, C, 2]; inside [N G, C, C]; theta [N G, C]; mix
    [N G, 4]; state, final [G, 2 dv, dk]; kept [pieces + 1, G, 2 dv, dk]; start, final_start [G, dv, dk]; grid (G,
    blocks of dv)."""
    g = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.arange(0, BLOCK_K)
    i = tl.arange(0, C)
    tile = rows[:, None] * dk + column[None, :]
    in_tile = (rows < dv)[:, None] & (column < dk)[None, :]
    keys = i[:, None] * dk + column[None, :]
    in_keys = (column < dk)[None, :] & (i >= 0)[:, None]
    values = i[:, None] * dv + rows[None, :]
    in_values = (rows < dv)[None, :] & (i >= 0)[:, None]
    half = dv * dk
    W = tl.load(state + 2 * g * half + tile, mask=in_tile, other=0.0)
    S = tl.load(state + 2 * g * half + half + tile, mask=in_tile, other=0.0)
    first = tl.load(start + g * half + tile, mask=in_tile, other=0.0)  # where gradients are taken
    last = tl.load(ends + g) // C
    for c in range(N):
        at = c * G + g
        if SAVE and c % size == 0:
            piece = kept + 2 * ((c // size) * G + g) * half
            tl.store(piece + tile, W, mask=in_tile)
            tl.store(piece + half + tile, S, mask=in_tile)
        if c == last:
            tl.store(final_start + g * half + tile, first, mask=in_tile)
        K = tl.load(k + at * C * dk + keys, mask=in_keys, other=0.0)
        Q = tl.load(q + at * C * dk + keys, mask=in_keys, other=0.0)
        delta = tl.dot(K, tl.trans(first), input_precision=PRECISION)
        delta -= tl.load(v + at * C * dv + values, mask=in_values, other=0.0)
        if SAVE:
            tl.store(err + at * C * dv + values, delta, mask=in_values)
        w, _, _, _ = steps(tl.load(theta + at * C + i), delta, K, clip, threshold, CLIP, THRESHOLD)
        moves = delta * w[:, None]
        a = tl.load(read + (at * C + i) * 2)
        b = tl.load(read + (at * C + i) * 2 + 1)
        among = tl.load(inside + at * C * C + i[:, None] * C + i[None, :])
        out = a[:, None] * tl.dot(Q, tl.trans(W), input_precision=PRECISION)
        out += b[:, None] * tl.dot(Q, tl.trans(S), input_precision=PRECISION)
        attention = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * among
        out -= tl.dot(attention, moves, input_precision=PRECISION)
        tl.store(y + at * C * dv + values, out, mask=in_values)
        to_W = moves * tl.load(end + (at * C + i) * 2)[:, None]
        to_S = moves * tl.load(end + (at * C + i) * 2 + 1)[:, None]
        W = tl.load(mix + at * 4) * W + tl.load(mix + at * 4 + 1) * S
        W -= tl.dot(tl.trans(to_W), K, input_precision=PRECISION)
        S = tl.load(mix + at * 4 + 3) * S - tl.dot(tl.trans(to_S), K, input_precision=PRECISION)
        first = W
    tl.store(final + 2 * g * half + tile, W, mask=in_tile)
    tl.store(final + 2 * g * half + half + tile, S, mask=in_tile)
    if last == N:
        tl.store(final_start + g * half + tile, W, mask=in_tile)


@triton.jit
def backward_kernel(
    q, k, err, d_y, read, inside, end, theta, mix, kept, start, ends, d_final, d_final_start, history,
    d_q, d_k, d_v, d_read, d_steps, d_moves, d_mix, d_state, d_start,
    N, G, dk, dv, size, pieces, clip, threshold, CLIP: tl.constexpr, THRESHOLD: tl.constexpr, DETACH: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Segments of `size` chunks from the last to the first, each replayed from its kept state into `history`
    [G, size, 2 dv, dk]. Shapes as in `forward_kernel`. With R blocks of rows, d_q, d_k [R, N G, C, dk], d_read,
    d_moves [R, N G, C, 2], d_steps [R, N G, C, C] and d_mix [R, N G, 4] are parts of sums over the blocks: gradients
    of read, of `end` times the steps, of `inside` times the steps, and of mix."""
    g = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64) * N * G
    rows = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.arange(0, BLOCK_K)
    i = tl.arange(0, C)
    tile = rows[:, None] * dk + column[None, :]
    in_tile = (rows < dv)[:, None] & (column < dk)[None, :]
    keys = i[:, None] * dk + column[None, :]
    in_keys = (column < dk)[None, :] & (i >= 0)[:, None]
    values = i[:, None] * dv + rows[None, :]
    in_values = (rows < dv)[None, :] & (i >= 0)[:, None]
    square = i[:, None] * C + i[None, :]
    half = dv * dk
    own = history + 2 * g * size * half
    stop = tl.load(ends + g)
    last = stop // C
    before = tl.load(start + g * half + tile, mask=in_tile, other=0.0)
    d_before = tl.zeros_like(before)
    d_last = tl.load(d_final_start + g * half + tile, mask=in_tile, other=0.0)
    d_W = tl.load(d_final + 2 * g * half + tile, mask=in_tile, other=0.0)
    d_S = tl.load(d_final + 2 * g * half + half + tile, mask=in_tile, other=0.0)
    if last == N:
        d_W += d_last
    for back in range(pieces):
        piece = pieces - 1 - back
        chunks = tl.minimum(size, N - piece * size)
        W = tl.load(kept + 2 * (piece * G + g) * half + tile, mask=in_tile, other=0.0)
        S = tl.load(kept + 2 * (piece * G + g) * half + half + tile, mask=in_tile, other=0.0)
        for j in range(chunks):
            tl.store(own + 2 * j * half + tile, W, mask=in_tile)
            tl.store(own + 2 * j * half + half + tile, S, mask=in_tile)
            at = (piece * size + j) * G + g
            K = tl.load(k + at * C * dk + keys, mask=in_keys, other=0.0)
            delta = tl.load(err + at * C * dv + values, mask=in_values, other=0.0)
            w, _, _, _ = steps(tl.load(theta + at * C + i), delta, K, clip, threshold, CLIP, THRESHOLD)
            to_W = delta * (w * tl.load(end + (at * C + i) * 2))[:, None]
            to_S = delta * (w * tl.load(end + (at * C + i) * 2 + 1))[:, None]
            W = tl.load(mix + at * 4) * W + tl.load(mix + at * 4 + 1) * S
            W -= tl.dot(tl.trans(to_W), K, input_precision=PRECISION)
            S = tl.load(mix + at * 4 + 3) * S - tl.dot(tl.trans(to_S), K, input_precision=PRECISION)
        tl.debug_barrier()  # other threads may read what one wrote
        for earlier in range(chunks):
            j = chunks - 1 - earlier
            c = piece * size + j
            at = c * G + g
            W = tl.load(own + 2 * j * half + tile, mask=in_tile, other=0.0)
            S = tl.load(own + 2 * j * half + half + tile, mask=in_tile, other=0.0)
            K = tl.load(k + at * C * dk + keys, mask=in_keys, other=0.0)
            Q = tl.load(q + at * C * dk + keys, mask=in_keys, other=0.0)
            delta = tl.load(err + at * C * dv + values, mask=in_values, other=0.0)
            grad = tl.load(d_y + at * C * dv + values, mask=in_values, other=0.0)
            step = tl.load(theta + at * C + i)
            w, error, key, scale = steps(step, delta, K, clip, threshold, CLIP, THRESHOLD)
            a, b = tl.load(read + (at * C + i) * 2), tl.load(read + (at * C + i) * 2 + 1)
            end_W, end_S = tl.load(end + (at * C + i) * 2), tl.load(end + (at * C + i) * 2 + 1)
            among = tl.load(inside + at * C * C + square)
            # reads
            by_W = tl.dot(grad, W, input_precision=PRECISION)
            by_S = tl.dot(grad, S, input_precision=PRECISION)
            tl.store(d_read + ((part + at) * C + i) * 2, tl.sum(by_W * Q, 1))
            tl.store(d_read + ((part + at) * C + i) * 2 + 1, tl.sum(by_S * Q, 1))
            attention = tl.dot(Q, tl.trans(K), input_precision=PRECISION)
            d_attention = -tl.dot(grad, tl.trans(delta), input_precision=PRECISION)
            d_among = attention * d_attention
            tl.store(d_steps + (part + at) * C * C + square, d_among)
            attention *= among * w[None, :]
            d_attention *= among * w[None, :]
            d_delta = -tl.dot(tl.trans(attention), grad, input_precision=PRECISION)
            d_keys = tl.dot(tl.trans(d_attention), Q, input_precision=PRECISION)
            d_query = a[:, None] * by_W + b[:, None] * by_S + tl.dot(d_attention, K, input_precision=PRECISION)
            tl.store(d_q + (part + at) * C * dk + keys, d_query, mask=in_keys)
            # the update
            on_W = tl.dot(K, tl.trans(d_W), input_precision=PRECISION)
            on_S = tl.dot(K, tl.trans(d_S), input_precision=PRECISION)
            d_end_W, d_end_S = -tl.sum(on_W * delta, 1), -tl.sum(on_S * delta, 1)
            tl.store(d_moves + ((part + at) * C + i) * 2, d_end_W)
            tl.store(d_moves + ((part + at) * C + i) * 2 + 1, d_end_S)
            d_delta -= (w * end_W)[:, None] * on_W + (w * end_S)[:, None] * on_S
            d_keys -= tl.dot(delta * (w * end_W)[:, None], d_W, input_precision=PRECISION)
            d_keys -= tl.dot(delta * (w * end_S)[:, None], d_S, input_precision=PRECISION)
            tl.store(d_mix + (part + at) * 4, tl.sum(d_W * W))
            tl.store(d_mix + (part + at) * 4 + 1, tl.sum(d_W * S))
            tl.store(d_mix + (part + at) * 4 + 3, tl.sum(d_S * S))
            if CLIP:  # d scale / d square = -scale / (2 square); the 2 goes against those of the squares
                d_w = d_end_W * end_W + d_end_S * end_S + tl.sum(d_among * among, 0)
                norm = error * key
                d_norm = tl.where(norm > clip * clip, -d_w * step * scale / tl.where(norm > 0, norm, 1.0), 0.0)
                d_delta += (d_norm * key)[:, None] * delta
                d_keys += (d_norm * error)[:, None] * K
            d_S = tl.load(mix + at * 4 + 1) * d_W + tl.load(mix + at * 4 + 3) * d_S
            d_W = tl.load(mix + at * 4) * d_W
            d_W += tl.dot(tl.trans(a[:, None] * grad), Q, input_precision=PRECISION)
            d_S += tl.dot(tl.trans(b[:, None] * grad), Q, input_precision=PRECISION)
            # the errors, K first' - V
            d_first = tl.dot(tl.trans(d_delta), K, input_precision=PRECISION)
            if c == last:
                d_first += d_last
            if c == 0:
                d_before += d_first
                W = before
            else:
                d_W += d_first
            d_keys += tl.dot(d_delta, W, input_precision=PRECISION)
            tl.store(d_k + (part + at) * C * dk + keys, d_keys, mask=in_keys)
            tl.store(d_v + at * C * dv + values, -d_delta, mask=in_values)
            if DETACH:
                cut = (c > 0) & (c % DETACH == 0) & (stop > c * C)
                d_W, d_S = tl.where(cut, 0.0, d_W), tl.where(cut, 0.0, d_S)
        tl.debug_barrier()
    tl.store(d_state + 2 * g * half + tile, d_W, mask=in_tile)
    tl.store(d_state + 2 * g * half + half + tile, d_S, mask=in_tile)
    tl.store(d_start + g * half + tile, d_before, mask=in_tile)


def fits(k: Tensor, v: Tensor, layers: int, clip: float | None, threshold: float | None) -> bool:
    """Whether the kernels serve these shapes and options: tiles are powers of two of at least 16."""
    C = k.shape[1]
    rows = WIDEST if clip is not None or threshold is not None else v.shape[2]
    return layers == 1 and 16 <= C <= 64 and C & (C - 1) == 0 and 16 <= k.shape[2] <= 128 and 16 <= v.shape[2] <= rows


def warps(rows: int) -> int:
    """For a program with that many rows."""
    return 8 if rows > BLOCK_V else 4


def _options(k: Tensor, dv: int, clip: float | None, threshold: float | None) -> dict:
    rows = BLOCK_V if clip is None and threshold is None else triton.next_power_of_2(dv)
    return {
        "num_warps": warps(rows),
        "clip": clip or 0.0,
        "threshold": threshold or 0.0,
        "CLIP": clip is not None,
        "THRESHOLD": threshold is not None,
        "PRECISION": "tf32x3" if k.dtype == torch.float32 else "ieee",
        "C": k.shape[1],
        "BLOCK_K": triton.next_power_of_2(k.shape[2]),
        "BLOCK_V": rows,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    c: Coefficients,
    own_write: bool,
    state: Tensor,
    start: Tensor,
    ends: Tensor,
    size: int,
    save: bool,
    clip: float | None,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, the final state, the start of the last chunk, and for the backward the kept states and the errors.

    size is the number of chunks in a segment. The last kept state is unused.
    """
    G, dk, dv = state.shape[0], k.shape[2], v.shape[2]
    N = k.shape[0] // G
    y, final, final_start = torch.empty_like(v), torch.empty_like(state), torch.empty_like(start)
    err = torch.empty_like(v if save else v[:0])
    kept = state.new_empty(-(-N // size) + 1 if save else 0, *state.shape)
    tensors = [x.contiguous() for x in (q, k, v, *c.read(own_write), c.end(), theta, c.mix(), state, start, ends)]
    options = _options(k, dv, clip, threshold)
    forward_kernel[(G, triton.cdiv(dv, options["BLOCK_V"]))](
        *tensors, y, err, kept, final, final_start, N, G, dk, dv, size, SAVE=save, **options
    )
    return y, final, final_start, kept, err


def backward(
    d_y: Tensor,
    d_state: Tensor,
    d_final_start: Tensor,
    inputs: tuple[Tensor, ...],
    start: Tensor,
    ends: Tensor,
    saved: list[Tensor],
    size: int,
    clip: float | None,
    threshold: float | None,
    own_write: bool,
    detach_every: int | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of q, k, v, gates and theta, of the first state, and of `start`; arguments as in `backward.py`."""
    q, k, theta, mask = inputs
    kept, err, D, P = saved
    c = Coefficients(D, P, mask[..., None])
    (read, inside), end = c.read(own_write), c.end()
    G, dk, dv = d_state.shape[0], k.shape[2], d_y.shape[2]
    options = _options(k, dv, clip, threshold)
    blocks = triton.cdiv(dv, options["BLOCK_V"])
    d_q, d_k, d_read, d_steps, d_moves, d_mix = (
        x.new_zeros(blocks, *x.shape) for x in (q, k, read, inside, end, c.mix())
    )
    d_v, d_first_state, d_start = torch.empty_like(d_y), torch.empty_like(d_state), torch.empty_like(start)
    history = kept.new_empty(G, size, *d_state.shape[1:])
    tensors = [q, k, err, d_y, read, inside, end, theta, c.mix(), kept, start, ends, d_state, d_final_start, history]
    backward_kernel[(G, blocks)](
        *(x.contiguous() for x in tensors), d_q, d_k, d_v, d_read, d_steps, d_moves, d_mix, d_first_state, d_start,
        k.shape[0] // G, G, dk, dv, size, len(kept) - 1, DETACH=detach_every or 0, num_stages=STAGES, **options,
    )  # fmt: skip
    d_q, d_k, d_read, d_steps, d_moves, d_mix = (x.sum(0) for x in (d_q, d_k, d_read, d_steps, d_moves, d_mix))
    error, key = err.square().sum(-1), k.square().sum(-1)
    scale = torch.ones_like(theta)
    if clip is not None:
        scale = torch.where(error * key > clip**2, clip * (error * key).clamp(min=clip**2).rsqrt(), 1.0)
    if threshold is not None:
        scale = scale * (error >= threshold)
    w = theta * scale
    d_theta = ((d_moves * end).sum(-1) + (d_steps * inside).sum(-2)) * scale
    d_A, d_P = torch.empty_like(P), torch.empty_like(P)
    d_A[..., 0], d_P[..., 0] = d_read.unbind(-1)
    d_P[..., 1:] = d_steps * w[:, None]
    d_gates = coefficients_backward(c, d_mix, d_moves * w[..., None], d_A, d_P, own_write)
    return [d_q, d_k, d_v, d_gates, d_theta], d_first_state, d_start
