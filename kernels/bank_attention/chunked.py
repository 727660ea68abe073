"""Bank attention in torch operators: pairs of token and chapter, a chapter at a time, never a copy of the bank.

With o_j and l_j the softmax read of chapter j alone and the logarithm of its sum, a joint read is
sum_j exp(l_j + log w_j - L) o_j with L = logsumexp_j(l_j + log w_j), and a separate one sum_j w_j o_j.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from memzoo.kernels.bank_attention.attend import attend, attend_backward
from memzoo.kernels.bank_attention.plan import Plan, Span, make_plan, pair_weights

Load = Callable[[int, int], tuple[Tensor, Tensor]]  # first, last -> keys [Hk, last - first, d] and values


def slices(k: Tensor, v: Tensor) -> Load:
    """The bank's keys and values as they are."""
    return lambda first, last: (k[:, first:last], v[:, first:last])


class Reader:
    """Gathers the rows of a span from token-major tensors [n, g, Hk, ...] as the batch that `attend` wants, and back.

    The g query heads of a key head are g rows; in this order of the heads neither way copies more than the gather.
    """

    def __init__(self, plan: Plan, kv_heads: int) -> None:
        self.plan, self.kv_heads = plan, kv_heads

    def enter(self, x: Tensor) -> Tensor:
        """[n, H, ...] -> [n, g, Hk, ...]."""
        return x.unflatten(1, (self.kv_heads, -1)).transpose(1, 2).contiguous()

    def leave(self, x: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return x.transpose(1, 2).flatten(1, 2)

    def gather(self, x: Tensor, span: Span) -> Tensor:
        """[n, g, Hk, d] -> [tiles, Hk, rows g, d]."""
        return self.batch(x.index_select(0, self.plan.token[span.start : span.stop]))

    def batch(self, rows: Tensor) -> Tensor:
        """[pairs, g, Hk, ...] -> [tiles, Hk, rows g, ...]; everything is one tile unless in deterministic mode."""
        count, tile = len(rows), self.plan.tile
        tiles = count // tile if tile and count % tile == 0 else 1
        return rows.reshape(tiles, -1, *rows.shape[2:]).transpose(1, 2)

    def rows(self, x: Tensor, count: int) -> Tensor:
        """The inverse of `batch`."""
        return x.transpose(1, 2).reshape(count, -1, self.kv_heads, *x.shape[3:])


def add_rows(to: Tensor, token: Tensor, rows: Tensor) -> None:
    """to[token] += rows; in two dimensions, which index_add_ does several times faster than in four."""
    to.view(len(to), -1).index_add_(0, token, rows.reshape(len(token), -1))


def forward(
    q: Tensor,
    bank: tuple[int, int, Load],
    chapters: Tensor,
    log_weights: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [n, H, d]; bank: N, Hk and how to load; chapters, log_weights [n, S]. Returns out [n, H, d], L [n, H]."""
    N, kv_heads, load = bank
    plan = make_plan(chapters, N, size, shared)
    weights = pair_weights(log_weights, shared)
    if not joint:
        out, sums, _ = _accumulate(q, plan, kv_heads, load, weights.exp(), None, scale)
        return out.to(q.dtype), sums
    # exponentials are taken relative to the token's largest weight; where that is not enough, to its largest term
    used = torch.where(chapters < 0, -torch.inf, log_weights)
    top = torch.cat([used, used.new_full((len(q), 1), 0.0 if shared else -torch.inf)], 1).amax(1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0).expand(-1, q.shape[1])
    out, sums, terms = _accumulate(q, plan, kv_heads, load, weights, top, scale)
    reads = sums[plan.token]
    if reads.numel() and not bool(reads.log().abs().max() < 0.75 * math.log(torch.finfo(sums.dtype).max)):
        index = plan.token[:, None].expand_as(terms)
        top = torch.full_like(sums, -torch.inf).scatter_reduce(0, index, terms, "amax")
        top = torch.where(top.isfinite(), top, 0.0)
        out, sums, _ = _accumulate(q, plan, kv_heads, load, weights, top, scale)
    out = out.div_(torch.where(sums > 0, sums, 1.0)[..., None])
    return out.to(q.dtype), sums.log() + top


def _accumulate(q, plan, kv_heads, load, weights, top, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over pairs: of exp(l + log w - top) o with the exponentials and their exponents, or of w o without top."""
    reader = Reader(plan, kv_heads)
    q = reader.enter(q)
    out = torch.zeros_like(q, dtype=weights.dtype)
    sums = weights.new_zeros(q.shape[:3])
    terms = weights.new_empty(len(plan.token) if top is not None else 0, *q.shape[1:3])
    top = None if top is None else reader.enter(top)
    for span in plan.spans:
        at = slice(span.start, span.stop)
        token, weight = plan.token[at], weights[plan.pair[at], None, None]
        k, v = load(span.first, span.last)
        read, lse = attend(reader.gather(q, span), k.to(q.dtype), v.to(q.dtype), scale)
        if top is not None:
            torch.add(reader.rows(lse, len(token)), weight, out=terms[at])
            weight = (terms[at] - top[token]).exp_()
            sums.index_add_(0, token, weight)
        add_rows(out, token, reader.rows(read, len(token)).to(out.dtype).mul_(weight[..., None]))
    return reader.leave(out), reader.leave(sums), reader.leave(terms)


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
    """Gradients of q, k, v, log_weights (zero without `router`); each chapter's read is computed again."""
    plan = make_plan(chapters, k.shape[1], size, shared)
    weights = pair_weights(log_weights, shared)
    reader, load = Reader(plan, k.shape[0]), slices(k, v)
    q, grad, out, lse = (reader.enter(x) for x in (q, grad, out, lse))
    dq, dk, dv = (torch.zeros_like(x, dtype=weights.dtype) for x in (q, k, v))
    dw = torch.zeros_like(weights)
    for span in plan.spans:
        at = slice(span.start, span.stop)
        token, weight = plan.token[at], weights[plan.pair[at], None, None]
        keys, values = load(span.first, span.last)
        rows, g = reader.gather(q, span), grad.index_select(0, token)
        if router or not joint:
            read, own = attend(rows, keys, values, scale)
        if joint:
            whole = out.index_select(0, token)
            norm = torch.where(weight.isinf(), torch.inf, lse[token] - weight)
            if router:
                share = (reader.rows(own, len(token)) - norm).exp()  # [pairs, g, Hk] of the softmax
                along = (g * (reader.rows(read, len(token)) - whole)).sum(-1, dtype=dw.dtype)
                dw.index_add_(0, plan.pair[at], (share * along).sum((1, 2)))
            read, own = reader.batch(whole), reader.batch(norm)
        else:
            g = (g * weight.exp()[..., None]).to(q.dtype)
            dw.index_add_(0, plan.pair[at], (g * reader.rows(read, len(token))).sum((1, 2, 3), dtype=dw.dtype))
        d_rows, d_keys, d_values = attend_backward(reader.batch(g), rows, keys, values, read, own, scale)
        add_rows(dq, token, reader.rows(d_rows, len(token)).to(dq.dtype))
        dk[:, span.first : span.last] += d_keys
        dv[:, span.first : span.last] += d_values
    dq, dk, dv = (x.to(q.dtype) for x in (reader.leave(dq), dk, dv))
    return dq, dk, dv, dw[: log_weights.numel()].view_as(log_weights)
