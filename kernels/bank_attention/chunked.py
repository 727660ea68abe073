"""Bank attention in torch operators: pairs of token and chapter, a chapter at a time, never a copy of the bank.

Pair j of a token has sums e_j = sum_i exp(l_i) v_i and s_j = sum_i exp(l_i) over its chapter's keys i. A joint read is
sum_j w_j e_j / sum_j w_j s_j, and a separate one sum_j w_j e_j / s_j. Exponentials are taken as they are; should sums
leave three quarters of the range of exponents, those tokens are read again relative to their largest logit.
"""

import math

import torch
from torch import Tensor

from memzoo.kernels.bank_attention.plan import Stage, make_plan, pair_weights
from memzoo.kernels.bank_attention.products import Load, Reader, slices

__all__ = ["Load", "backward", "forward", "slices"]


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
    plan = make_plan(chapters, N, size, shared, q.shape[1] * q.shape[2])
    weights = pair_weights(log_weights, shared)[plan.pair]
    reader = Reader(plan, kv_heads, load, weights.dtype, scale)
    x = reader.enter(q)
    if joint:
        out, lse = _joint(x, reader, weights, _largest(chapters, log_weights, shared))
    else:
        out, lse = torch.zeros_like(x), x.new_zeros(x.shape[:3])
        for stage in plan.stages:
            read, _ = _own_reads(reader.gather("q", x, stage), reader, stage)
            reader.add(out, read.mul_(weights[stage.start : stage.stop, None, None, None].exp()), stage)
    return reader.leave(out).to(q.dtype), reader.leave(lse)


def _largest(chapters: Tensor, log_weights: Tensor, shared: int) -> Tensor:
    """[n]: of a token's logarithms of weights; -inf if it reads nothing."""
    used = torch.where(chapters < 0, -torch.inf, log_weights)
    return torch.cat([used, used.new_full((len(used), 1), 0.0 if shared else -torch.inf)], 1).amax(1)


def _joint(x: Tensor, reader: Reader, weights: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Out [n, g, Hk, d] and L; weights [R] of the pairs, largest [n]."""
    token, nothing = reader.plan.token, largest.isinf()
    largest = torch.where(nothing, 0.0, largest)
    weights = weights - largest[token]
    out, sums = _sums(x, reader, None, weights.exp())
    top, good = torch.zeros_like(sums), _in_range(sums) | nothing[:, None, None]
    if not bool(good.all()):
        own = [reader.maxima(reader.gather("q", x, stage), stage) for stage in reader.plan.stages]
        logits = torch.cat(own) + weights[:, None, None]
        index = token[:, None, None].expand_as(logits)
        top = torch.full_like(top, -torch.inf).scatter_reduce(0, index, logits, "amax")
        top = torch.where(good | top.isinf(), 0.0, top)
        again, totals = _sums(x, reader, top[token] - weights[:, None, None], None)
        out, sums = torch.where(good[..., None], out, again), torch.where(good, sums, totals)
    out = out.div_(torch.where(sums > 0, sums, 1.0)[..., None])
    return out, sums.log() + top + largest[:, None, None]


def _sums(x: Tensor, reader: Reader, offset: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum_j w_j e_j and sum_j w_j s_j of each token, or without weights of logits less the pairs' offset."""
    out, sums = torch.zeros_like(x), x.new_zeros(x.shape[:3])
    for stage in reader.plan.stages:
        at = slice(stage.start, stage.stop)
        read, total = reader.read(reader.gather("q", x, stage), stage, None if offset is None else offset[at])
        if weights is not None:
            read.mul_(weights[at, None, None, None])
            total.mul_(weights[at, None, None])
        reader.add(out, read, stage)
        reader.add(sums, total, stage)
    return out, sums


def _own_reads(rows: Tensor, reader: Reader, stage: Stage) -> tuple[Tensor, Tensor]:
    """The pairs' softmax reads and the logarithms of their sums."""
    read, total = reader.read(rows, stage, None)
    top, good = torch.zeros_like(total), _in_range(total)
    if not bool(good.all()):
        first, top = read.clone(), torch.where(good, 0.0, reader.maxima(rows, stage))
        again, totals = reader.read(rows, stage, top)
        read, total = torch.where(good[..., None], first, again), torch.where(good, total, totals)
    return read.div_(total[..., None]), total.log_().add_(top)


def _in_range(sums: Tensor) -> Tensor:
    return sums.log().abs() < 0.75 * math.log(torch.finfo(sums.dtype).max)


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
    """Gradients of q, k, v, log_weights; logits are computed again."""
    plan = make_plan(chapters, k.shape[1], size, shared, q.shape[1] * q.shape[2])
    weights = pair_weights(log_weights, shared)
    reader = Reader(plan, k.shape[0], slices(k, v), weights.dtype, scale)
    x, grad, out, lse = (reader.enter(y) for y in (q, grad, out, lse))
    delta = (grad * out).sum(-1) if joint else lse
    dq, dw = torch.zeros_like(x), torch.zeros_like(weights)
    to = torch.zeros_like(k, dtype=weights.dtype), torch.zeros_like(v, dtype=weights.dtype)
    for stage in plan.stages:
        pair = plan.pair[stage.start : stage.stop]
        weight = weights[pair, None, None]
        rows, g = reader.gather("q", x, stage), reader.gather("grad", grad, stage)
        if joint:
            norm = torch.where(weight.isinf(), torch.inf, reader.gather("lse", lse, stage) - weight)
            d_rows, along = reader.backward(rows, g, stage, norm, reader.gather("delta", delta, stage), to)
        else:
            read, norm = _own_reads(rows, reader, stage)
            g = g * weight[..., None].exp()
            along = (g * read).sum(-1)
            d_rows, _ = reader.backward(rows, g, stage, norm, along, to)
        dw.index_add_(0, pair, along.sum((1, 2)))
        reader.add(dq, d_rows, stage)
    dq, dk, dv = (y.to(q.dtype) for y in (reader.leave(dq), *to))
    return dq, dk, dv, dw[: log_weights.numel()].view_as(log_weights)
