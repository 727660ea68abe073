"""Windowed attention as torch operators, on any device: blocks of queries as a larger batch, O(T window)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.window_attention.reference import visible

Pair = tuple[Tensor, Tensor]


def window_attention_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: Pair | None,
    first: Tensor | None,
    per: int,
    dropout: float,
) -> Tensor:
    """Arguments as those of the public op."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, d]
    if prefix is not None:
        prefix = (prefix[0].transpose(1, 2), prefix[1].transpose(1, 2))
    T, keys = q.shape[2], k.shape[2]
    everything = window is None or window * per >= keys  # always decided: torch.export learns the bound from it
    if window is not None and per == 1 and max(window, 16) < T:
        y = _in_blocks(q, k, v, prefix, first, window, dropout)
    elif prefix is None and first is None and everything and (T == 1 or keys == T):
        y = _sdpa(q, k, v, None, None, dropout, is_causal=T > 1)
    else:
        start = torch.zeros(1, dtype=torch.int64, device=q.device) if first is None else first
        y = _sdpa(q, k, v, prefix, visible(T, keys, start, window, per)[:, None], dropout)
    return y.transpose(1, 2)


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, prefix: Pair | None, first: Tensor | None, w: int, dropout: float
) -> Tensor:
    """Blocks of C queries, each over its own and the m blocks of keys before it."""
    B, _, T, _ = q.shape
    past = k.shape[2] - T
    C = max(16, min(w, 128))
    n, m = -(-T // C), -(-(w - 1) // C)  # blocks of queries, and of keys before each
    left, right = m * C - past, n * C - T
    q = F.pad(q, (0, 0, 0, right)).unflatten(2, (n, C)).transpose(1, 2).flatten(0, 1)  # [B n, H, C, d]
    k, v = (F.pad(x, (0, 0, left, right)).unflatten(2, (m + n, C)) for x in (k, v))
    k, v = (
        torch.cat([x[:, :, i : i + n] for i in range(m + 1)], 3).transpose(1, 2).flatten(0, 1) for x in (k, v)
    )  # [B n, Hkv, (m + 1) C, d]
    if prefix is not None:
        prefix = tuple(x.repeat_interleave(n, 0) for x in prefix)
    i = torch.arange(m * C, (m + 1) * C, device=q.device)[:, None]
    j = torch.arange((m + 1) * C, device=q.device)
    band = (j <= i) & (i < j + w)  # [C, (m + 1) C]
    place = torch.arange(n, device=q.device)[:, None] * C + j  # [n, (m + 1) C] index of each key
    start = torch.zeros(B, dtype=torch.int64, device=q.device) if first is None else first
    exists = place >= (start + left)[:, None, None]  # [B, n, (m + 1) C]
    seen = (band & exists[:, :, None]).flatten(0, 1)[:, None]  # [B n, 1, C, (m + 1) C]
    y = _sdpa(q, k, v, prefix, seen, dropout)
    return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Pair | None,
    seen: Tensor | None,
    dropout: float,
    is_causal: bool = False,
) -> Tensor:
    if prefix is not None:
        k, v = (torch.cat(pair, 2) for pair in zip(prefix, (k, v)))
        seen = F.pad(seen, (prefix[0].shape[2], 0), value=True)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if seen is not None and q.shape[2] > 1 and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # with a mask torch's own takes twice the time of these products
        scores = torch.where(seen, (q.shape[-1] ** -0.5 * q) @ k.mT, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=is_causal)
