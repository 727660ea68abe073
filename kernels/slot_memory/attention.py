"""Softmax attention of every query to M consecutive entries of a row, from its own offset, with what the peak needs.

Queries go in chunks of C. As offsets never decrease and grow by at most 1 per query, a chunk sees at most M + C
entries: its window. Chunks are taken in groups whose logits fit the cache; the backward recomputes them. The bias may
grow with time; base, one number a chunk, keeps what enters the products small.

    s_ti = q_t k_i + bias_i - base for offset_t <= i < offset_t + M, the top_k largest of them
    p = softmax(s);  y_t = sum_i p_ti v_i;  peak_t = max_i p_ti;  an empty row reads 0
"""

import torch
from torch import Tensor

CHUNK = 64
GROUP = 1 << 18  # logits at a time


class _Windows:
    """The windows of a group of chunks, without their first `skip` entries."""

    def __init__(self, offset: Tensor, num_slots: int, entries: int, skip: int) -> None:
        place = torch.arange(skip, num_slots + offset.shape[2], device=offset.device)
        self.index = offset[:, :, :1] + place  # [B, g, W]
        first = offset - offset[:, :, :1]  # [B, g, C]
        self.hidden = (place < first[..., None]) | (place >= first[..., None] + num_slots)  # [B, g, C, W]
        self.entries = entries

    def rows(self, heads: int) -> Tensor:
        """Numbers of the entries among all [B H E], flat."""
        B = self.index.shape[0]
        start = torch.arange(B * heads, device=self.index.device).view(B, heads, 1, 1) * self.entries
        return (start + self.index[:, None]).flatten()

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """[B, H, E, d] -> [B H g, W, d]"""
        return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(-1, self.index.shape[2], x.shape[-1])

    def bias(self, bias: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, g, C, W]: the bias less the chunk's base [B, g], -inf where nothing is to be seen."""
        B, g, W = self.index.shape
        b = (bias.gather(1, self.index.flatten(1)).view(B, g, W) - base[..., None]).to(dtype)
        return b[:, :, None].masked_fill(self.hidden, -torch.inf)


def _groups(B: int, H: int, n: int, C: int, num_slots: int, fresh: bool) -> list[tuple[int, int, int]]:
    """First and last chunk, and entries of their windows to be skipped: of the first chunk the slots still empty."""
    size = max(1, GROUP // (B * H * C * (num_slots + C)))
    first = [(0, 1, num_slots)] if fresh else []
    return first + [(i, min(i + size, n), 0) for i in range(len(first), n, size)]


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """p [G, C, W]; q [G, C, d], k [G, W, d], bias [B, g, C, W]."""
    H = q.shape[0] // (bias.shape[0] * bias.shape[1])
    bias = bias[:, None].expand(-1, H, -1, -1, -1).reshape(-1, *bias.shape[2:])
    s = torch.baddbmm(bias, q, k.mT)
    if 0 < top_k < s.shape[-1]:
        s.masked_fill_(s < s.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True), -torch.inf)
    return s.softmax(-1).masked_fill_(s.amax(-1, keepdim=True).isneginf(), 0.0)


@torch.library.custom_op("memzoo::slot_attention", mutates_args=())
def slot_attention(
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
    """q [B, H, n, C, dk], k [B, H, E, dk], v [B, H, E, dv], bias [B, E], base [B, n] float64, offset [B, n, C] int64.

    Every window must lie inside: offset + M + C <= E. top_k 0 is all. `fresh` says that the first M entries are empty
    and the first offset is 0. Returns y [B, H, n, C, dv], peak [B, H, n, C] and, if asked, the entropy, which carries
    no gradient.
    """
    B, H, n, C, _ = q.shape
    y = q.new_empty(B, H, n, C, v.shape[-1])
    peak = q.new_empty(B, H, n, C)
    spread = q.new_empty(B, H, n if entropy else 0, C)
    for a, z, skip in _groups(B, H, n, C, num_slots, fresh):
        window = _Windows(offset[:, a:z], num_slots, k.shape[2], skip)
        rows = window.rows(H)
        keys, values = window.take(k, rows), window.take(v, rows)
        p = _probabilities(q[:, :, a:z].flatten(0, 2), keys, window.bias(bias, base[:, a:z], q.dtype), top_k)
        y[:, :, a:z] = torch.bmm(p, values).view(B, H, z - a, C, -1)
        peak[:, :, a:z] = p.amax(-1).view(B, H, z - a, C)
        if entropy:
            spread[:, :, a:z] = torch.special.entr(p).sum(-1).view(B, H, z - a, C)
    return y, peak, spread


@slot_attention.register_fake
def _(q, k, v, bias, base, offset, num_slots, top_k, entropy, fresh=False):
    B, H, n, C, _ = q.shape
    return q.new_empty(B, H, n, C, v.shape[-1]), q.new_empty(B, H, n, C), q.new_empty(B, H, n if entropy else 0, C)


@torch.library.custom_op("memzoo::slot_attention_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    grad_peak: Tensor,
    y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    base: Tensor,
    offset: Tensor,
    num_slots: int,
    top_k: int,
    fresh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, n, C, _ = q.shape
    dq, dk, dv = torch.empty_like(q, memory_format=torch.contiguous_format), torch.zeros_like(k), torch.zeros_like(v)
    dk, dv = dk.contiguous(), dv.contiguous()
    d_bias = torch.zeros_like(bias)
    for a, z, skip in _groups(B, H, n, C, num_slots, fresh):
        window = _Windows(offset[:, a:z], num_slots, k.shape[2], skip)
        rows = window.rows(H)
        keys, values = window.take(k, rows), window.take(v, rows)
        queries, dy = q[:, :, a:z].flatten(0, 2), grad_y[:, :, a:z].flatten(0, 2)
        p = _probabilities(queries, keys, window.bias(bias, base[:, a:z], q.dtype), top_k)
        # peak = p_top: its gradient goes to the largest, and from all as the softmax's sum does
        top, place = p.max(-1, keepdim=True)
        d_top = grad_peak[:, :, a:z].reshape(-1, C, 1) * top
        ds = torch.bmm(dy, values.mT)
        ds.sub_((dy * y[:, :, a:z].flatten(0, 2)).sum(-1, keepdim=True).add_(d_top)).mul_(p)
        ds.scatter_add_(-1, place, d_top)
        dq[:, :, a:z] = torch.bmm(ds, keys).view(B, H, z - a, C, -1)
        dk.view(-1, k.shape[-1]).index_add_(0, rows, torch.bmm(ds.mT, queries).flatten(0, 1))
        dv.view(-1, v.shape[-1]).index_add_(0, rows, torch.bmm(p.mT, dy).flatten(0, 1))
        per_entry = ds.sum(1).view(B, H, -1).sum(1)  # [B, g W]
        d_bias.scatter_add_(1, window.index.flatten(1), per_entry.to(bias.dtype))
    return dq, dk, dv, d_bias


@_backward_op.register_fake
def _(grad_y, grad_peak, y, q, k, v, bias, base, offset, num_slots, top_k, fresh):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, bias))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.num_slots, ctx.top_k, _, ctx.fresh = inputs
    ctx.save_for_backward(output[0], *tensors)


def _backward(ctx, grad_y: Tensor, grad_peak: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward_op(
        grad_y.contiguous(), grad_peak.contiguous(), *ctx.saved_tensors, ctx.num_slots, ctx.top_k, ctx.fresh
    )
    return *grads, None, None, None, None, None, None


slot_attention.register_autograd(_backward, setup_context=_save)
