"""Cross-attention from tokens to a bank of learned memory tokens, whole or by chapters that a router chose per token.

`reference.py` is the definition, a loop over tokens. `chunked.py` sorts tokens by chapter and computes with torch
operators, `fused.py` does so in compiled CPU loops and `triton.py` on a GPU; all see the bank's keys and values once,
never a copy per token or sample.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.bank_attention import chunked, fused
from memzoo.kernels.bank_attention.chunked import Load
from memzoo.kernels.bank_attention.gathered import FEW, bank_attention_gathered, bank_attention_masked
from memzoo.kernels.bank_attention.operators import choose, routed
from memzoo.kernels.bank_attention.reference import bank_attention as reference

__all__ = ["Load", "bank_attention", "bank_attention_loaded", "reference"]

Mixing = Literal["joint", "separate"]
DENSE = 8  # a few tokens read the whole bank, masked, if it is at most so many times what each of them chose
MANY = 1 << 20  # logits of a whole read for which compiled loops are worth their call
Implementation = Literal["auto", "reference", "chunked", "fused", "triton"]


def bank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor | None = None,
    log_weights: Tensor | None = None,
    num_chapters: int = 1,
    num_shared: int = 0,
    mixing: Mixing = "joint",
    scale: float | None = None,
    groups: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention (arXiv 1706.03762, eq. 1) over a bank that all tokens share, or over chosen parts of it.

    The bank's N tokens are `num_chapters` chapters of equal size. Token t reads the shared chapters, the first
    `num_shared`, and the chapters c_j = chapters[t, j] that its router chose, with weights
    w_j = exp(log_weights[t, j]):

        joint:     one softmax over all of them, log w_j added to the logits of chapter c_j
        separate:  Attn(q, K_shared) V_shared + sum_j w_j Attn(q, K_cj) V_cj

    Args:
        q: [B, T, H, dh]. k: [Hk, N, dh], v: [Hk, N, dv], the bank's, projected once; Hk divides H.
        chapters: [B, G, S] int64, -1 for a slot that is not used; log_weights: [B, G, S]. G = T: a choice per token;
            G = 1: one per row. Without chapters every token reads the whole bank.
        scale: of the logits; None is dh^-1/2.
        groups: [B, T] int64, the choice 0 <= g < G that each token uses: one choice per block of tokens.

    Returns:
        [B, T, H, dv] in q's dtype; 0 where there is nothing to read. Softmaxes and the sums over chapters are in at
        least float32. Differentiable once in q, k, v and log_weights.

    Raises:
        ValueError: a shape, a number of chapters or an option does not fit.
    """
    _check(q, k, v, chapters, log_weights, num_chapters, num_shared, mixing, groups)
    B, T, _, dh = q.shape
    scale = dh**-0.5 if scale is None else scale
    if implementation == "reference":
        return reference(q, k, v, chapters, log_weights, num_chapters, num_shared, mixing, scale, groups)
    name = choose(implementation, q.device.type)
    if chapters is None:
        if name != "fused" or (implementation == "auto" and not _compiled_is_faster(q, k, v)):
            return _whole(q, k, v, scale)
        chapters = torch.empty(B, T, 0, dtype=torch.int64)  # all of it is shared
        log_weights, num_chapters, num_shared, mixing = q.new_empty(B, T, 0), 1, 1, "joint"
    dtype = torch.promote_types(q.dtype, torch.float32)
    chapters, log_weights = per_token(chapters, log_weights.to(dtype), T, groups)
    size, dv = k.shape[1] // num_chapters, v.shape[-1]
    few = implementation == "auto" and B * T <= FEW and not torch.is_grad_enabled()
    if few and mixing == "joint" and num_chapters <= DENSE * (chapters.shape[-1] + num_shared):
        bank = (k.to(q.dtype), v.to(q.dtype))
        out = bank_attention_masked(q.flatten(0, 1), *bank, chapters, log_weights, size, num_shared * size, scale)
        return out.unflatten(0, (B, T))
    rows, k, v = q.flatten(0, 1), k.to(q.dtype), v.to(q.dtype)
    step = fused.PAD if name == "fused" else 1
    width = -(-max(dh, dv) // step) * step  # the kernels have one width of head
    if dv != width or dh != width:
        rows, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (rows, k, v))
    arguments = (rows.contiguous(), k.contiguous(), v.contiguous(), chapters, log_weights)
    options = (size, num_shared * size, mixing == "joint", scale)
    if few and not torch.compiler.is_compiling():
        out = bank_attention_gathered(*arguments, *options)
    else:
        out, _ = routed(*arguments, *options, name)
    return out[..., :dv].unflatten(0, (B, T))


def bank_attention_loaded(
    q: Tensor,
    load: Load,
    bank_shape: tuple[int, int],
    chapters: Tensor | None = None,
    log_weights: Tensor | None = None,
    num_chapters: int = 1,
    num_shared: int = 0,
    mixing: Mixing = "joint",
    scale: float | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """As `bank_attention` without gradients, over a bank that never is in memory as a whole.

    Args:
        load: `load(first, last)` returns the keys and the values of these memory tokens, both [Hk, last - first, dh].
            It is asked for a chapter that a token chose, the shared chapters, or, without chapters, one of the
            `num_chapters` parts of the bank after another.
        bank_shape: (Hk, N).
    """
    B, T, _, dh = q.shape
    (kv_heads, N), dtype = bank_shape, torch.promote_types(q.dtype, torch.float32)
    if chapters is None:
        chapters = torch.arange(num_chapters, device=q.device).expand(B, 1, -1)
        log_weights, num_shared, mixing = chapters.new_zeros(chapters.shape, dtype=dtype), 0, "joint"
    chapters, log_weights = per_token(chapters, log_weights.to(dtype), T, groups)
    size, scale = N // num_chapters, dh**-0.5 if scale is None else scale
    bank = (N, kv_heads, load)
    with torch.no_grad():
        options = (chapters, log_weights, size, num_shared * size, mixing == "joint", scale)
        out, _ = chunked.forward(q.flatten(0, 1), bank, *options)
    return out.unflatten(0, (B, T))


def per_token(chapters: Tensor, log_weights: Tensor, T: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, G, S] -> [B T, S]."""
    if groups is not None:
        index = groups[..., None].expand(-1, -1, chapters.shape[2])
        chapters, log_weights = chapters.gather(1, index), log_weights.gather(1, index)
    elif chapters.shape[1] != T:
        chapters, log_weights = (x.expand(-1, T, -1) for x in (chapters, log_weights))
    return chapters.flatten(0, 1), log_weights.flatten(0, 1)


def _compiled_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled loops read a whole bank faster than torch, whose forward alone is as good."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or q.dtype not in (torch.float32, torch.float64):
        return False
    return any(x.requires_grad for x in (q, k, v)) and q[..., 0].numel() * k.shape[1] >= MANY


def _whole(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The batch and the heads that share a key head are folded into the queries, so that the bank is read once."""
    (B, T, H, dh), (kv_heads, _, dv) = q.shape, v.shape
    k, v = (x[None].to(q.dtype) for x in (k, v))
    q = q.reshape(B * T, kv_heads, -1, dh).permute(1, 2, 0, 3) if kv_heads > 1 else q
    q = q.reshape(1, kv_heads, -1, dh)  # [1, Hk, g B T, dh]; with one head nothing moves
    parts = _parts(q)
    if parts > 1:
        q = q.view(kv_heads, parts, -1, dh).transpose(0, 1)
        k, v = (x.expand(parts, -1, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if parts > 1:
        out = out.transpose(0, 1).reshape(1, kv_heads, -1, dv)
    if kv_heads == 1:
        return out.view(B, T, H, dv)
    return out.view(kv_heads, H // kv_heads, B, T, dv).permute(2, 3, 0, 1, 4).flatten(2, 3)


def _parts(q: Tensor) -> int:
    """Into how many the rows of q [1, Hk, rows, dh] are split: on the CPU torch's backward has one thread a head."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 1
    wanted = torch.get_num_threads() // q.shape[1]
    return max((n for n in range(1, wanted + 1) if q.shape[2] % n == 0), default=1)


def _check(q, k, v, chapters, log_weights, num_chapters, num_shared, mixing, groups) -> None:
    if q.ndim != 4 or k.ndim != 3 or v.ndim != 3:
        shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        raise ValueError(f"bank_attention: q must be [B, T, H, dh], k and v [Hk, N, d], not {shapes}")
    B, T, H, dh = q.shape
    if k.shape[2] != dh or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"bank_attention: k is {list(k.shape)} and v {list(v.shape)}; q's heads are {dh} wide")
    if H % k.shape[0]:
        raise ValueError(f"bank_attention: {H} query heads are not a multiple of the bank's {k.shape[0]} heads")
    if mixing not in ("joint", "separate"):
        raise ValueError(f"bank_attention: mixing must be 'joint' or 'separate', not {mixing!r}")
    if k.shape[1] % num_chapters:
        raise ValueError(f"bank_attention: {num_chapters} chapters do not divide a bank of {k.shape[1]} tokens")
    if not 0 <= num_shared <= num_chapters:
        raise ValueError(f"bank_attention: num_shared {num_shared} must be between 0 and the {num_chapters} chapters")
    if chapters is None:
        if log_weights is not None or groups is not None:
            raise ValueError("bank_attention: log_weights and groups belong to chapters, which are absent")
        return
    if log_weights is None or log_weights.shape != chapters.shape or chapters.ndim != 3 or chapters.shape[0] != B:
        given = None if log_weights is None else list(log_weights.shape)
        raise ValueError(
            f"bank_attention: chapters {list(chapters.shape)} and log_weights {given} must both be [{B}, G, S]"
        )
    if groups is None and chapters.shape[1] not in (1, T):
        raise ValueError(f"bank_attention: {chapters.shape[1]} choices for {T} tokens need `groups`")
    if groups is not None and tuple(groups.shape) != (B, T):
        raise ValueError(f"bank_attention: groups is {list(groups.shape)}, expected [{B}, {T}]")
