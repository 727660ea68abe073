"""One token of the slot memory: a decoding step."""

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """x [..., d] with length 1, or 0."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()


def slot_memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor,
    write: Tensor | None,
    mask: Tensor | None,
    written_strength: Tensor | None,
    rate: float = 1.0,
    decay: float = 1.0,
    top_k: int | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """As `slot_memory_chunked`, for T = 1."""
    w = slot_weights(q, key, strength, top_k)
    y, peak = w @ value, w.amax(-1)  # [B, H, 1, dv], [B, H, 1]
    spread = torch.special.entr(w.detach()).sum(-1) if entropy else None
    k = unit(k)
    if rate != 1.0:
        step = torch.where(strength[:, None, :1, None].isneginf(), k.new_ones(()), rate)
        k, v = torch.lerp(key[:, :, :1], k, step), torch.lerp(value[:, :, :1], v, step)
    added = torch.zeros_like(strength[:, :1]) if written_strength is None else written_strength
    new = [torch.cat([old[..., 1:, :], x], -2) for old, x in ((key, k), (value, v))]
    new.append(torch.cat([strength[:, 1:], added], 1))
    if write is not None:
        new = [torch.where(write.view(-1, *[1] * (x.ndim - 1)), x, old) for x, old in zip(new, (key, value, strength))]
    if decay != 1.0:
        elapsed = 1 if mask is None else mask.to(strength.dtype)
        new[2] = new[2] + elapsed * math.log(decay)
    if mask is not None:
        y, peak = y * mask[:, None, :, None], peak * mask[:, None]
        spread = None if spread is None else spread * mask[:, None]
    return y, peak, spread, *new


def slot_weights(q: Tensor, key: Tensor, strength: Tensor, top_k: int | None = None) -> Tensor:
    """Weights [B, H, T, M] of slots that stay as they are, 0 where all are empty.

    Args:
        q: [B, H, T, dk], key: [B, H, M, dk]. strength: [B, M] or [B, H, M], log, -inf for an empty slot.
    """
    strength = strength[:, None] if strength.ndim == 2 else strength
    logits = q @ unit(key).mT + strength[:, :, None]
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    some = ~strength.isneginf().all(-1)[:, :, None, None]
    return torch.where(some, torch.where(some, logits, 0.0).softmax(-1), 0.0)
