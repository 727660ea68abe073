"""The definition of windowed attention: every query meets every key, and a mask says which it sees."""

import torch
from torch import Tensor


def visible(T: int, keys: int, first: Tensor, window: int | None, per: int = 1) -> Tensor:
    """[B, T, keys] bool: token i sees the keys of token j iff 0 <= i - j < window and j exists; the last T keys are
    those of the queries."""
    i = torch.arange(keys // per - T, keys // per, device=first.device)[:, None]
    j = torch.arange(keys, device=first.device) // per
    seen = j <= i
    if window is not None:
        seen = seen & (i - j < window)
    return seen & (j >= first[:, None])[:, None]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None = None,
    first: Tensor | None = None,
    per: int = 1,
) -> Tensor:
    """Arguments and result as those of the public op."""
    first = torch.zeros(len(q), dtype=torch.int64, device=q.device) if first is None else first
    seen = visible(q.shape[1], k.shape[1], first, window, per)
    if prefix is not None:
        k, v = (torch.cat(pair, 1) for pair in zip(prefix, (k, v)))
        seen = torch.nn.functional.pad(seen, (prefix[0].shape[1], 0), value=True)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)
