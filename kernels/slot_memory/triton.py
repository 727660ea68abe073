"""The attention of `attention.py` on a GPU in Triton, forward and backward; imported only when it runs.

A program owns a chunk of C queries of one head and walks its window of M + C entries in blocks, with the running
maximum and sum of FlashAttention (arXiv 2205.14135). Chunks share entries, so the backward adds the gradients of keys,
values and biases with atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memzoo.kernels.slot_memory.attention import slot_attention

BLOCK = 32  # entries at a time
LAUNCH = {
    "num_stages": 2,
    "num_warps": 8,
}  # with these, and C d at most 4096, the backward takes 160 KB of shared memory


@triton.jit
def _logits(
    Q, k, bias, base, start, first, w, b, bh, E, dk, M,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits [C, BLOCK] of a window's entries from w on, -inf where hidden; keys; rows; which exist."""
    j = w + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_K)
    row = start + j
    exists = row < E
    K = tl.load(k + (bh * E + row[:, None]) * dk + d[None, :], mask=exists[:, None] & (d < dk)[None, :], other=0.0)
    offset = (tl.load(bias + b * E + row, mask=exists, other=float("-inf")) - base).to(Q.dtype)
    s = tl.dot(Q, tl.trans(K), input_precision=PRECISION).to(Q.dtype) + offset[None, :]
    seen = (j[None, :] >= first[:, None]) & (j[None, :] < first[:, None] + M)
    return tl.where(seen, s, float("-inf")), K, row, exists


@triton.jit
def forward_kernel(
    q, k, v, bias, base, offset, y, peak, top, best, H, n, C, E, dk, dv, M,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """q, y [B H, n, C, d]; k, v [B H, E, d]; bias [B, E], base [B, n] float64; offset [B, n, C]; peak, top (the
    largest logit), best (its place in the window) [B H, n, C]; grid (B H, n)."""
    bh = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b = bh // H
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    at = (bh * n + chunk) * C + c
    Q = tl.load(q + at[:, None] * dk + d[None, :], mask=(c < C)[:, None] & (d < dk)[None, :], other=0.0)
    start = tl.load(offset + (b * n + chunk) * C)
    first = tl.load(offset + (b * n + chunk) * C + c, mask=c < C, other=0) - start
    zero = tl.load(base + b * n + chunk)
    m = tl.full([BLOCK_C], -1e30, Q.dtype)
    total = tl.zeros([BLOCK_C], Q.dtype)
    place = tl.zeros([BLOCK_C], tl.int32)
    acc = tl.zeros([BLOCK_C, BLOCK_V], Q.dtype)
    for w in range(0, M + C, BLOCK):
        s, _, row, exists = _logits(Q, k, bias, zero, start, first, w, b, bh, E, dk, M, PRECISION, BLOCK, BLOCK_K)
        V = tl.load(v + (bh * E + row[:, None]) * dv + e[None, :], mask=exists[:, None] & (e < dv)[None, :], other=0.0)
        here = tl.max(s, 1)
        place = tl.where(here > m, w + tl.argmax(s, 1).to(tl.int32), place)
        new = tl.maximum(m, here)
        p = tl.exp(s - new[:, None])
        shrink = tl.exp(m - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p, V, input_precision=PRECISION).to(Q.dtype)
        m = new
    scale = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(y + at[:, None] * dv + e[None, :], acc * scale[:, None], mask=(c < C)[:, None] & (e < dv)[None, :])
    tl.store(peak + at, scale, mask=c < C)
    tl.store(top + at, m, mask=c < C)
    tl.store(best + at, place, mask=c < C)


@triton.jit
def backward_kernel(
    grad_y, grad_peak, y, peak, top, best, q, k, v, bias, base, offset, dq, d_key, d_value, d_bias,
    H, n, C, E, dk, dv, M,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """d_key, d_value, d_bias start at zero; everything else as in the forward."""
    bh = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b = bh // H
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    at = (bh * n + chunk) * C + c
    in_q = (c < C)[:, None] & (d < dk)[None, :]
    in_y = (c < C)[:, None] & (e < dv)[None, :]
    Q = tl.load(q + at[:, None] * dk + d[None, :], mask=in_q, other=0.0)
    dy = tl.load(grad_y + at[:, None] * dv + e[None, :], mask=in_y, other=0.0)
    scale = tl.load(peak + at, mask=c < C, other=0.0)
    d_top = tl.load(grad_peak + at, mask=c < C, other=0.0) * scale
    lost = tl.sum(dy * tl.load(y + at[:, None] * dv + e[None, :], mask=in_y, other=0.0), 1) + d_top
    m = tl.load(top + at, mask=c < C, other=0.0)
    place = tl.load(best + at, mask=c < C, other=-1)
    start = tl.load(offset + (b * n + chunk) * C)
    first = tl.load(offset + (b * n + chunk) * C + c, mask=c < C, other=0) - start
    zero = tl.load(base + b * n + chunk)
    acc = tl.zeros([BLOCK_C, BLOCK_K], Q.dtype)
    for w in range(0, M + C, BLOCK):
        s, K, row, exists = _logits(Q, k, bias, zero, start, first, w, b, bh, E, dk, M, PRECISION, BLOCK, BLOCK_K)
        in_v = exists[:, None] & (e < dv)[None, :]
        V = tl.load(v + (bh * E + row[:, None]) * dv + e[None, :], mask=in_v, other=0.0)
        p = tl.exp(s - m[:, None]) * scale[:, None]
        ds = p * (tl.dot(dy, tl.trans(V), input_precision=PRECISION).to(Q.dtype) - lost[:, None])
        j = w + tl.arange(0, BLOCK)
        ds += tl.where(j[None, :] == place[:, None], d_top[:, None], 0.0)
        acc += tl.dot(ds, K, input_precision=PRECISION).to(Q.dtype)
        to_k = tl.dot(tl.trans(ds), Q, input_precision=PRECISION).to(Q.dtype)
        to_v = tl.dot(tl.trans(p), dy, input_precision=PRECISION).to(Q.dtype)
        in_k = exists[:, None] & (d < dk)[None, :]
        tl.atomic_add(d_key + (bh * E + row[:, None]) * dk + d[None, :], to_k, mask=in_k)
        tl.atomic_add(d_value + (bh * E + row[:, None]) * dv + e[None, :], to_v, mask=in_v)
        tl.atomic_add(d_bias + b * E + row, tl.sum(ds, 0).to(tl.float64), mask=exists)
    tl.store(dq + at[:, None] * dk + d[None, :], acc, mask=in_q)


def fits(dk: int, dv: int, top_k: int, entropy: bool) -> bool:
    """Whether the kernel serves these widths and options."""
    return max(dk, dv) <= 128 and top_k == 0 and not entropy


def _arguments(q: Tensor, k: Tensor, v: Tensor, num_slots: int) -> tuple[tuple[int, int], list[int], dict]:
    """Grid, integers and compile-time options of both kernels."""
    B, H, n, C, dk = q.shape
    E, dv = v.shape[2:]
    options = {
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        "BLOCK": BLOCK,
        "BLOCK_C": max(16, triton.next_power_of_2(C)),
        "BLOCK_K": max(16, triton.next_power_of_2(dk)),
        "BLOCK_V": max(16, triton.next_power_of_2(dv)),
    }
    return (B * H, n), [H, n, C, E, dk, dv, num_slots], options


@torch.library.custom_op("memzoo::slot_attention_triton", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, base: Tensor, offset: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, peak, the largest logit and its place."""
    y, peak = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
    top, best = torch.empty_like(peak), torch.empty_like(peak, dtype=torch.int32)
    grid, integers, options = _arguments(q, k, v, num_slots)
    tensors = [x.contiguous() for x in (q, k, v, bias, base, offset)]
    forward_kernel[grid](*tensors, y, peak, top, best, *integers, **options, **LAUNCH)
    return y, peak, top, best


@_forward.register_fake
def _(q, k, v, bias, base, offset, num_slots):
    peak = q.new_empty(q.shape[:-1])
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    return y, peak, torch.empty_like(peak), torch.empty_like(peak, dtype=torch.int32)


@torch.library.custom_op("memzoo::slot_attention_triton_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    grad_peak: Tensor,
    y: Tensor,
    peak: Tensor,
    top: Tensor,
    best: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    base: Tensor,
    offset: Tensor,
    num_slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grid, integers, options = _arguments(q, k, v, num_slots)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v, bias)]
    tensors = [x.contiguous() for x in (grad_y, grad_peak, y, peak, top, best, q, k, v, bias, base, offset)]
    backward_kernel[grid](*tensors, dq, *sums, *integers, **options, **LAUNCH)
    return dq, *sums


@_backward_op.register_fake
def _(grad_y, grad_peak, y, peak, top, best, q, k, v, bias, base, offset, num_slots):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, bias))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.num_slots = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad_y: Tensor, grad_peak: Tensor, *_) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad_y, grad_peak, *ctx.saved_tensors, ctx.num_slots), None, None, None


_forward.register_autograd(_backward, setup_context=_save)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    base: Tensor,
    offset: Tensor,
    num_slots: int,
    top_k: int,
    entropy: bool,
    fresh: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `slot_attention`, which it calls for what the kernel does not serve."""
    if not fits(q.shape[-1], v.shape[-1], top_k, entropy):
        return slot_attention(q, k, v, bias, base, offset, num_slots, top_k, entropy, fresh)
    n, C = q.shape[2:4]
    halves = 2 if C % 2 == 0 and C * max(q.shape[-1], v.shape[-1]) > 4096 else 1
    if halves > 1:
        q, offset = q.unflatten(3, (halves, -1)).flatten(2, 3), offset.unflatten(2, (halves, -1)).flatten(1, 2)
        base = base.repeat_interleave(halves, 1)
    y, peak, _, _ = _forward(q, k, v, bias, base, offset, num_slots)
    y, peak = y.unflatten(2, (n, halves)).flatten(3, 4), peak.unflatten(2, (n, halves)).flatten(3, 4)
    return y, peak, peak.new_empty(*peak.shape[:2], 0, C)
