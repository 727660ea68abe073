"""The definition of the slot memory: each sequence by itself, one token after another, slots in a list."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mixed(new: Tensor, old: Tensor, rate: float) -> Tensor:
    return new if rate == 1.0 else (1 - rate) * old + rate * new


def read_slots(
    q: Tensor, keys: Tensor, values: Tensor, strengths: Tensor, top_k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q [H, dk], keys [H, n, dk], values [H, n, dv], strengths [n]: the read [H, dv], peak [H] and entropy [H]."""
    logits = (F.normalize(keys, dim=-1) @ q[..., None]).squeeze(-1) + strengths  # [H, n]
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = torch.where(logits < least, -torch.inf, logits)
    w = logits.softmax(-1)
    return (w[..., None] * values).sum(1), w.max(-1).values, torch.special.entr(w).sum(-1)


def slot_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor,
    write: Tensor,
    mask: Tensor,
    written_strength: Tensor,
    rate: float = 1.0,
    decay: float = 1.0,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the public op; returns the read, peak, entropy, and the state's key, value, strength."""
    rows: list[list[Tensor]] = [[] for _ in range(6)]
    for b in range(q.shape[0]):
        # oldest first; an empty slot has no strength
        slots = list(zip(key[b].unbind(1), value[b].unbind(1), strength[b].unbind(0)))
        reads = []
        for t in range(q.shape[2]):
            filled = [slot for slot in slots if slot[2] > -math.inf]
            if not mask[b, t] or not filled:
                zero = q.new_zeros(q.shape[1])
                reads.append((torch.zeros_like(v[b, :, t]), zero, zero))
            else:
                keys, values, strengths = zip(*filled)
                slots_now = torch.stack(keys, 1), torch.stack(values, 1), torch.stack(strengths)
                reads.append(read_slots(q[b, :, t], *slots_now, top_k))
            if not mask[b, t]:
                continue
            if write[b, t]:
                old_key, old_value, old_strength = slots.pop(0)
                step = rate if old_strength > -math.inf else 1.0
                new = (F.normalize(k[b, :, t], dim=-1), v[b, :, t])
                slots.append((mixed(new[0], old_key, step), mixed(new[1], old_value, step), written_strength[b, t]))
            slots = [(*slot[:2], slot[2] + math.log(decay)) for slot in slots]
        for row, items, dim in zip(rows, (*zip(*reads), *zip(*slots)), (1, 1, 1, 1, 1, 0)):
            row.append(torch.stack(items, dim))
    return tuple(torch.stack(row) for row in rows)
