"""From tokens to the slots of chunks and back. Pads take no slot, so chunk boundaries count real tokens only."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = (0.0, 0.0, 0.0, 1.0, 1.0, 0.0)  # an empty slot is a no-op: q = k = v = 0, keep = eta = 1, theta = 0


class Slots(NamedTuple):
    tensors: list[Tensor]  # q, k, v [N G, C, d], keep, eta, theta [N G, C]
    mask: Tensor  # [N G, C], 1 where a token is
    slot: Tensor | None  # [B, T], N C for pads; None when token t is in slot t
    length: int  # T


def _chunk_major(x: Tensor, C: int) -> Tensor:
    """[B, H, N C, ...] -> [N B H, C, ...]."""
    return x.unflatten(2, (-1, C)).movedim(2, 0).flatten(0, 2)


def to_chunks(tensors: list[Tensor], C: int, mask: Tensor | None, position: Tensor | None) -> Slots:
    """tensors [B, H, T, ...]; with a position [B], row b's first real token goes to slot position[b]."""
    B, H, T = tensors[0].shape[:3]
    like = tensors[-1]
    if position is None:
        pad = -T % C
        placed, real = tensors, like.new_ones(B, H, T)
        if pad:  # F.pad by nothing copies, and so does its backward
            placed = [F.pad(x, (0, 0) * (x.ndim - 3) + (0, pad), value=fill) for x, fill in zip(tensors, FILL)]
            real = F.pad(real, (0, pad))
        slot = None
    else:
        N = (C - 1 + T + C - 1) // C  # enough for every position
        slot = position[:, None] + torch.arange(T, device=like.device)
        if mask is not None:
            slot = torch.where(mask, position[:, None] + mask.cumsum(1) - 1, N * C)

        def place(x: Tensor, fill: float) -> Tensor:
            index = slot.view(B, 1, T, *(1,) * (x.ndim - 3)).expand_as(x)
            empty = x.new_full((B, H, N * C + 1, *x.shape[3:]), fill)
            return empty.scatter(2, index, x)[:, :, : N * C]

        placed = [place(x, fill) for x, fill in zip(tensors, FILL)]
        real = place(like.new_ones(B, H, T), 0.0)
    return Slots([_chunk_major(x, C) for x in placed], _chunk_major(real, C), slot, T)


def to_tokens(y: Tensor, slots: Slots, B: int, H: int) -> Tensor:
    """[N B H, C, d] -> [B, H, T, d], zero at pads."""
    y = y.unflatten(0, (-1, B, H)).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, H, N C, d]
    if slots.slot is None:
        return y if y.shape[2] == slots.length else y[:, :, : slots.length]
    index = slots.slot[:, None, :, None].expand(B, H, slots.length, y.shape[-1])
    return F.pad(y, (0, 0, 0, 1)).gather(2, index)
