"""The forward of the linear memory on a GPU in Triton, one kernel for the whole sequence; imported only when it runs.

The rows of W and S never meet, so a program owns a group's `BLOCK_V` rows of both, keeps them in registers, and walks
the chunks with the equations of `chunked.py` (one layer, no clip, no threshold). The coefficients come from
`coefficients.py`; what is saved is what `backward.py` expects.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 16  # rows of W and S per program: with chunks of 16 nothing spills, with 64 the fewest registers (ptxas)


@triton.jit
def forward_kernel(
    q, k, v, read, inside, scaled, mix, state, start, ends, y, err, kept, final, final_start,
    N, G, dk, dv, size,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """q, k [N G, C, dk]; v, y, err [N G, C, dv]; read, scaled [N G, C, 2]; inside [N G, C, C]; mix [N G, 4]; state,
    final [G, 2 dv, dk]; kept [pieces + 1, G, 2 dv, dk]; start, final_start [G, dv, dk]; grid (G, blocks of dv)."""
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
        a = tl.load(read + (at * C + i) * 2)
        b = tl.load(read + (at * C + i) * 2 + 1)
        steps = tl.load(inside + at * C * C + i[:, None] * C + i[None, :])
        out = a[:, None] * tl.dot(Q, tl.trans(W), input_precision=PRECISION)
        out += b[:, None] * tl.dot(Q, tl.trans(S), input_precision=PRECISION)
        attention = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * steps
        out -= tl.dot(attention, delta, input_precision=PRECISION)
        tl.store(y + at * C * dv + values, out, mask=in_values)
        to_W = delta * tl.load(scaled + (at * C + i) * 2)[:, None]
        to_S = delta * tl.load(scaled + (at * C + i) * 2 + 1)[:, None]
        W = tl.load(mix + at * 4) * W + tl.load(mix + at * 4 + 1) * S
        W -= tl.dot(tl.trans(to_W), K, input_precision=PRECISION)
        S = tl.load(mix + at * 4 + 3) * S - tl.dot(tl.trans(to_S), K, input_precision=PRECISION)
        first = W
    tl.store(final + 2 * g * half + tile, W, mask=in_tile)
    tl.store(final + 2 * g * half + half + tile, S, mask=in_tile)
    if last == N:
        tl.store(final_start + g * half + tile, W, mask=in_tile)


def fits(k: Tensor, v: Tensor, layers: int, clip: float | None, threshold: float | None) -> bool:
    """Whether the kernel serves these shapes and options: tiles are powers of two of at least 16."""
    C = k.shape[1]
    plain = layers == 1 and clip is None and threshold is None
    return plain and 16 <= C <= 64 and C & (C - 1) == 0 and 16 <= k.shape[2] <= 128 and v.shape[2] >= 16


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    inside: Tensor,
    scaled: Tensor,
    mix: Tensor,
    state: Tensor,
    start: Tensor,
    ends: Tensor,
    size: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, the final state, the start of the last chunk, and for the backward the kept states and the errors.

    inside and scaled include theta; size is the number of chunks in a segment. The last kept state is unused.
    """
    G, C, dk, dv = state.shape[0], k.shape[1], k.shape[2], v.shape[2]
    N = k.shape[0] // G
    y, final, final_start = torch.empty_like(v), torch.empty_like(state), torch.empty_like(start)
    err = torch.empty_like(v if save else v[:0])
    kept = state.new_empty(-(-N // size) + 1 if save else 0, *state.shape)
    precision = "tf32x3" if k.dtype == torch.float32 else "ieee"
    tensors = [x.contiguous() for x in (q, k, v, read, inside, scaled, mix, state, start, ends)]
    forward_kernel[(G, triton.cdiv(dv, BLOCK_V))](
        *tensors, y, err, kept, final, final_start, N, G, dk, dv, size,
        SAVE=save, PRECISION=precision, C=C, BLOCK_K=triton.next_power_of_2(dk), BLOCK_V=BLOCK_V,
    )  # fmt: skip
    return y, final, final_start, kept, err
