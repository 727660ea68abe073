"""Bank attention of a few tokens, as when decoding, without gradients.

Each token's chapters are copied beside one another, or, where they are much of a small bank, all of it is read.
"""

import torch
from torch import Tensor

FEW = 16  # tokens


def bank_attention_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
) -> Tensor:
    """q [n, H, d], k, v [Hk, N, d], chapters, log_weights [n, S] -> [n, H, d]. Without a gradient."""
    (n, _, d), (S, kv_heads) = q.shape, (chapters.shape[1], k.shape[0])
    wide = log_weights.dtype
    x = q.view(n, kv_heads, -1, d)
    unused = chapters < 0
    bias = torch.where(unused, -torch.inf, log_weights)[:, :, None, None, None]
    at = chapters.clamp_min(0)
    keys, values = (y.unflatten(1, (-1, size)).transpose(0, 1)[at] for y in (k, v))  # [n, S, Hk, size, d]
    logits = (x[:, None] @ keys.mT).to(wide) * scale  # [n, S, Hk, g, size]
    everyone = (x @ k[:, :shared].mT).to(wide) * scale  # [n, Hk, g, shared]
    if not joint:
        read = ((logits.softmax(-1) * bias.exp()).to(q.dtype) @ values).sum(1)
        if shared:
            read = read + everyone.softmax(-1).to(q.dtype) @ v[:, :shared]
        return read.flatten(1, 2)
    logits = (logits + bias).permute(0, 2, 3, 1, 4).flatten(3)  # [n, Hk, g, S size]
    p = torch.cat([logits, everyone], -1).softmax(-1).nan_to_num_(0.0).to(q.dtype)
    read = p[..., : S * size] @ values.transpose(1, 2).flatten(2, 3)
    return (read + p[..., S * size :] @ v[:, :shared]).flatten(1, 2)


def bank_attention_masked(
    q: Tensor, k: Tensor, v: Tensor, chapters: Tensor, log_weights: Tensor, size: int, shared: int, scale: float
) -> Tensor:
    """As `bank_attention_gathered` of a joint softmax, over every key, those of other chapters weighted with zero."""
    (n, H, _), (kv_heads, N, _) = q.shape, k.shape
    wide, C = log_weights.dtype, N // size
    bias = log_weights.new_full((n, C + 1), -torch.inf)  # the last is of slots that are not used
    bias = bias.scatter(1, chapters.remainder(C + 1), log_weights)  # -1 is C
    if shared:
        bias = torch.cat([bias.new_zeros(n, shared // size), bias[:, shared // size :]], 1)
    rows = (q * scale).view(n, kv_heads, -1, q.shape[2]).transpose(0, 1).reshape(kv_heads, -1, q.shape[2])
    logits = (rows @ k.mT).to(wide).view(kv_heads, n, -1, C, size) + bias[:, None, :C, None]
    p = logits.view(kv_heads, -1, N).softmax(-1)
    if not shared and (torch.compiler.is_exporting() or bool((chapters < 0).any())):
        p = p.nan_to_num(0.0)  # of tokens that read nothing
    return (p.to(q.dtype) @ v).view(kv_heads, n, H // kv_heads, -1).transpose(0, 1).flatten(1, 2)
