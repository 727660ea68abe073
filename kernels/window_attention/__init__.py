"""Causal attention over a window of tokens behind a prefix that all of them see (arXiv 2501.00663, section 3.3).

`reference.py` is the definition. `fused.py` computes windows on the CPU where numba is installed, `blocks.py` all
else.
"""

import torch
from torch import Tensor

from memzoo.kernels.window_attention import fused
from memzoo.kernels.window_attention.blocks import window_attention_blocks
from memzoo.kernels.window_attention.reference import window_attention as reference

__all__ = ["reference", "window_attention"]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None = None,
    first: Tensor | None = None,
    per: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k' / sqrt(d)) v: token i sees the keys of token j iff 0 <= i - j < window, and the whole prefix.

    Time and memory O(T window). Differentiable once on the CPU.

    Args:
        q: [B, T, H, d]. k, v: [B, (past + T) per, Hkv, d], the last T tokens being those of q; H divides by Hkv.
        window: tokens that a token sees, itself included; None for all.
        prefix: keys and values [B, P, Hkv, d], of any dtype.
        first: [B] int64, tokens before it do not exist, at most past; None where all do.
        per: keys of every token, one after the other.
        dropout: of the weights.

    Returns:
        [B, T, H, d] in q's dtype; half precision is computed in float32 by the compiled form.

    Raises:
        ValueError: a shape, the window or `per` does not fit.
    """
    _check(q, k, v, window, prefix, per)
    if prefix is not None:
        prefix = (prefix[0].to(k.dtype), prefix[1].to(v.dtype))
    if window is not None and dropout == 0 and not torch.compiler.is_compiling() and fused.fits(q):
        start = torch.zeros(len(q), dtype=torch.int64) if first is None else first
        return fused.window_attention_fused(q, k, v, prefix, start, window, per)
    return window_attention_blocks(q, k, v, window, prefix, first, per, dropout)


def _check(q, k, v, window, prefix, per) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"window_attention: q is [B, T, H, d], k and v [B, L, Hkv, d], not {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    (B, T, H, d), (keys, heads) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != d or H % heads:
        raise ValueError(f"window_attention: k {list(k.shape)} does not belong to q {list(q.shape)}")
    if (window is not None and window < 1) or per < 1:
        raise ValueError(f"window_attention: window and per must be at least 1, not {window} and {per}")
    if keys % per or keys < T * per:
        raise ValueError(f"window_attention: {keys} keys for {T} queries with {per} keys a token")
    for x in prefix or ():
        if x.shape != (B, x.shape[1], heads, d):
            raise ValueError(f"window_attention: the prefix {list(x.shape)} must be [{B}, P, {heads}, {d}]")
