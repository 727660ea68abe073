"""Bank attention on a GPU in Triton: tiles of pairs sorted by chapter, the choice never leaving the device.

A tile is BLOCK_R pairs of one chapter. The number of tiles depends on the routing, so the grid has as many programs as
there could be, and those without a tile return. A tile walks its chapter's keys with a running maximum (arXiv
2205.14135, algorithm 1) and writes the pair's own read o_j and l_j, which torch then combines as `chunked.py` says.
The gradients of keys and values go through the pairs of a chapter, one program per block of keys: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memzoo.kernels.bank_attention.plan import pair_weights

BLOCK_R, BLOCK_K = 64, 64  # pairs and keys of a tile


@triton.jit
def forward_kernel(
    q, k, v, token, tile_chapter, tile_start, ends, first_key, last_key, out, lse, scale, N, d, H,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q [n, H, d]; k, v [Hk, N, d]; token [R]; of each tile its chapter (-1: none) and first pair; of each chapter its
    last pair and keys; out [R, H, d], lse [R, H]; grid (tiles, H)."""
    chapter = tl.load(tile_chapter + tl.program_id(0))
    if chapter < 0:
        return
    head = tl.program_id(1)
    pair = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, BLOCK_R)
    real = pair < tl.load(ends + chapter)
    column = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (column < d)[None, :]
    row = (tl.load(token + pair, mask=real, other=0).to(tl.int64) * H + head) * d
    x = tl.load(q + row[:, None] + column[None, :], mask=inside, other=0.0)
    bank = (head // GROUPS).to(tl.int64) * N * d
    first, last = tl.load(first_key + chapter), tl.load(last_key + chapter)
    top = tl.full([BLOCK_R], -float("inf"), lse.dtype.element_ty)
    total = tl.zeros([BLOCK_R], lse.dtype.element_ty)
    read = tl.zeros([BLOCK_R, BLOCK_D], lse.dtype.element_ty)
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        at = bank + key[:, None].to(tl.int64) * d + column[None, :]
        there = (key < last)[:, None] & (column < d)[None, :]
        K = tl.load(k + at, mask=there, other=0.0)
        S = tl.dot(x, tl.trans(K), input_precision=PRECISION, out_dtype=lse.dtype.element_ty) * scale
        S = tl.where((key < last)[None, :], S, -float("inf"))
        new_top = tl.maximum(top, tl.max(S, 1))
        P = tl.exp(S - new_top[:, None])
        keep = tl.exp(top - new_top)
        total = total * keep + tl.sum(P, 1)
        V = tl.load(v + at, mask=there, other=0.0)
        read = read * keep[:, None] + tl.dot(
            P.to(V.dtype), V, input_precision=PRECISION, out_dtype=lse.dtype.element_ty
        )
        top = new_top
    to = (pair.to(tl.int64) * H + head) * d
    tl.store(out + to[:, None] + column[None, :], (read / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + pair * H + head, top + tl.log(total), mask=real)


@triton.jit
def query_kernel(
    q, k, v, g, norm, delta, token, tile_chapter, tile_start, ends, first_key, last_key, dq, scale, N, d, H,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq [R, H, d] of each pair, from g [R, H, d] and norm, delta [R, H]: P = exp(S - norm), dS = P (g V' - delta)."""
    chapter = tl.load(tile_chapter + tl.program_id(0))
    if chapter < 0:
        return
    head = tl.program_id(1)
    pair = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, BLOCK_R)
    real = pair < tl.load(ends + chapter)
    column = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (column < d)[None, :]
    row = (tl.load(token + pair, mask=real, other=0).to(tl.int64) * H + head) * d
    own = (pair.to(tl.int64) * H + head) * d
    x = tl.load(q + row[:, None] + column[None, :], mask=inside, other=0.0)
    G = tl.load(g + own[:, None] + column[None, :], mask=inside, other=0.0)
    n = tl.load(norm + pair * H + head, mask=real, other=float("inf"))
    c = tl.load(delta + pair * H + head, mask=real, other=0.0)
    bank = (head // GROUPS).to(tl.int64) * N * d
    first, last = tl.load(first_key + chapter), tl.load(last_key + chapter)
    D = tl.zeros([BLOCK_R, BLOCK_D], norm.dtype.element_ty)
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        at = bank + key[:, None].to(tl.int64) * d + column[None, :]
        there = (key < last)[:, None] & (column < d)[None, :]
        K = tl.load(k + at, mask=there, other=0.0)
        V = tl.load(v + at, mask=there, other=0.0)
        P = tl.exp(
            tl.dot(x, tl.trans(K), input_precision=PRECISION, out_dtype=norm.dtype.element_ty) * scale - n[:, None]
        )
        P = tl.where((key < last)[None, :], P, 0.0)
        dS = (
            P
            * (tl.dot(G, tl.trans(V), input_precision=PRECISION, out_dtype=norm.dtype.element_ty) - c[:, None])
            * scale
        )
        D += tl.dot(dS.to(K.dtype), K, input_precision=PRECISION, out_dtype=norm.dtype.element_ty)
    tl.store(dq + own[:, None] + column[None, :], D, mask=inside)


@triton.jit
def bank_kernel(
    q, k, v, g, norm, delta, token, begins, ends, dk, dv, scale, size, N, d, H,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to dk, dv [Hk, N, d] of a block of keys of a chapter, from all its pairs and the heads that share a key
    head; grid (chapters, blocks of keys, Hk)."""
    chapter = tl.program_id(0)
    begin, end = tl.load(begins + chapter), tl.load(ends + chapter)
    if begin >= end:
        return
    column = tl.arange(0, BLOCK_D)
    place = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    key = chapter * size + place
    there = (place < size)[:, None] & (column < d)[None, :]
    at = tl.program_id(2).to(tl.int64) * N * d + key[:, None].to(tl.int64) * d + column[None, :]
    K = tl.load(k + at, mask=there, other=0.0)
    V = tl.load(v + at, mask=there, other=0.0)
    to_K = tl.zeros([BLOCK_K, BLOCK_D], norm.dtype.element_ty)
    to_V = tl.zeros([BLOCK_K, BLOCK_D], norm.dtype.element_ty)
    for group in range(GROUPS):
        head = tl.program_id(2) * GROUPS + group
        for start in range(begin, end, BLOCK_R):
            pair = start + tl.arange(0, BLOCK_R)
            real = pair < end
            inside = real[:, None] & (column < d)[None, :]
            row = (tl.load(token + pair, mask=real, other=0).to(tl.int64) * H + head) * d
            own = (pair.to(tl.int64) * H + head) * d
            x = tl.load(q + row[:, None] + column[None, :], mask=inside, other=0.0)
            G = tl.load(g + own[:, None] + column[None, :], mask=inside, other=0.0)
            n = tl.load(norm + pair * H + head, mask=real, other=float("inf"))
            c = tl.load(delta + pair * H + head, mask=real, other=0.0)
            P = tl.exp(
                tl.dot(x, tl.trans(K), input_precision=PRECISION, out_dtype=norm.dtype.element_ty) * scale - n[:, None]
            )
            dS = (
                P
                * (tl.dot(G, tl.trans(V), input_precision=PRECISION, out_dtype=norm.dtype.element_ty) - c[:, None])
                * scale
            )
            to_V += tl.dot(tl.trans(P).to(G.dtype), G, input_precision=PRECISION, out_dtype=norm.dtype.element_ty)
            to_K += tl.dot(tl.trans(dS).to(x.dtype), x, input_precision=PRECISION, out_dtype=norm.dtype.element_ty)
    tl.store(dk + at, tl.load(dk + at, mask=there, other=0.0) + to_K, mask=there)
    tl.store(dv + at, tl.load(dv + at, mask=there, other=0.0) + to_V, mask=there)


class Part:
    """The routed pairs, or one read of the shared chapters per token, as tiles. Nothing is copied to the host."""

    def __init__(self, key: Tensor, token: Tensor, chapters: int, first: Tensor, last: Tensor) -> None:
        """key [R]: each pair's chapter, `chapters` for an unused one; first, last [chapters]: their keys."""
        order = key.argsort(stable=True)
        counts = key.bincount(minlength=chapters + 1)[:-1]
        self.order, self.token = order, token[order].contiguous()
        self.ends = counts.cumsum(0)
        self.begins = self.ends - counts
        self.first, self.last = first, last
        blocks = (counts + BLOCK_R - 1) // BLOCK_R
        block_ends = blocks.cumsum(0)
        most = len(key) // BLOCK_R + min(chapters, len(key))
        tile = torch.arange(most, device=key.device)
        chapter = torch.searchsorted(block_ends, tile, right=True)
        inside = chapter < chapters
        safe = chapter.clamp_max(chapters - 1)
        self.start = self.begins[safe] + (tile - (block_ends - blocks)[safe]) * BLOCK_R
        self.chapter = torch.where(inside, chapter, -1)

    def tiles(self) -> tuple[Tensor, ...]:
        return self.token, self.chapter, self.start, self.ends, self.first, self.last


def parts(chapters: Tensor, N: int, size: int, shared: int) -> list[tuple[Part, slice, int]]:
    """Each part, its places among `pair_weights`, and its chapters' size."""
    n, S = chapters.shape
    device, found = chapters.device, []
    if S:
        C = N // size
        first = torch.arange(C, device=device) * size
        token = torch.arange(n, device=device).repeat_interleave(S)
        key = torch.where(chapters < 0, C, chapters).flatten()
        found.append((Part(key, token, C, first, first + size), slice(0, n * S), size))
    if shared:
        zero, everyone = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(n, device=device)
        part = Part(torch.zeros_like(everyone), everyone, 1, zero, zero + shared)
        found.append((part, slice(n * S, n * S + n), shared))
    return found


def options(q: Tensor, k: Tensor) -> dict:
    precision = "tf32x3" if q.dtype == torch.float32 else "ieee"
    width = max(16, triton.next_power_of_2(q.shape[2]))
    blocks = {"BLOCK_R": BLOCK_R, "BLOCK_K": BLOCK_K, "BLOCK_D": width}
    return {"GROUPS": q.shape[1] // k.shape[0], "PRECISION": precision, **blocks}


def _reads(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """o and l of each pair in the part's own order; 0 and -inf where a slot is unused."""
    R, (_, H, d) = len(part.token), q.shape
    out, lse = q.new_zeros(R, H, d), q.new_full((R, H), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    grid = (len(part.chapter), H)
    forward_kernel[grid](q, k, v, *part.tiles(), out, lse, scale, k.shape[1], d, H, **options(q, k))
    return out, lse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the operator: out [n, H, d] and L [n, H], which is 0 if separate."""
    n, H, d = q.shape
    weights, lse = pair_weights(log_weights, shared), log_weights.new_zeros(n, H)
    found = [(part, *_reads(q, k, v, part, scale), at) for part, at, _ in parts(chapters, k.shape[1], size, shared)]
    if joint:
        top = torch.full_like(lse, -torch.inf)
        terms = [own + weights[at][part.order, None] for part, _, own, at in found]
        for (part, *_), term in zip(found, terms):
            top = top.scatter_reduce(0, part.token[:, None].expand_as(term), term, "amax")
        top = torch.where(top.isfinite(), top, 0.0)
        for (part, *_), term in zip(found, terms):
            lse.index_add_(0, part.token, (term - top[part.token]).exp())
        lse = lse.log() + top
    out = log_weights.new_zeros(n, H, d)
    for i, (part, read, own, at) in enumerate(found):
        used = own.isfinite()
        share = (terms[i] - lse[part.token]).exp() if joint else weights[at][part.order, None].exp().expand_as(own)
        out.index_add_(0, part.token, read * torch.where(used, share, 0.0)[..., None])
    return out.to(q.dtype), lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    out: Tensor,
    lse: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
    router: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_weights; each pair's own read is computed again."""
    H, d = q.shape[1:]
    (kv_heads, N, _), weights = k.shape, pair_weights(log_weights, shared)
    dq, dk, dv = (torch.zeros_like(x, dtype=weights.dtype) for x in (q, k, v))
    dw = torch.zeros_like(weights)
    for part, at, width in parts(chapters, N, size, shared):
        read, own = _reads(q, k, v, part, scale)
        used, weight = own.isfinite(), weights[at][part.order, None]
        g = grad[part.token]
        share = (own + weight - lse[part.token]).exp() if joint else weight.exp().expand_as(own)
        share = torch.where(used, share, 0.0)
        along = (g * read).sum(-1, dtype=weights.dtype)  # [R, H]
        if joint:
            norm = lse[part.token] - weight
            delta = (g * out[part.token]).sum(-1, dtype=weights.dtype)
            along = along - delta
        else:
            g = (g * share[..., None]).to(q.dtype)
            norm, delta = own, along * share
        dw[at] = torch.zeros_like(weights[at]).index_add(0, part.order, (share * along).sum(1))
        norm, delta = torch.where(share > 0, norm, torch.inf).contiguous(), delta.contiguous()
        pairs = torch.zeros_like(g, dtype=weights.dtype)
        arguments = (q, k, v, g.contiguous(), norm, delta)
        query_kernel[(len(part.chapter), H)](*arguments, *part.tiles(), pairs, scale, N, d, H, **options(q, k))
        dq.index_add_(0, part.token, pairs)
        grid = (len(part.ends), triton.cdiv(width, BLOCK_K), kv_heads)
        ranges = (part.token, part.begins, part.ends)
        bank_kernel[grid](*arguments, *ranges, dk, dv, scale, width, N, d, H, **options(q, k))
    dq, dk, dv = (x.to(q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv, dw[: log_weights.numel()].view_as(log_weights)
