"""Transported writes for all tokens at once. Addresses do not depend on what the slots hold, so every block's plan is
computed side by side, and each slot is a linear recurrence over the blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.linear_scan import linear_scan
from memzoo.kernels.slot_memory.step import slot_weights
from memzoo.kernels.transport_slots.sinkhorn import sinkhorn


def transport_slots_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prototypes: Tensor,
    state: tuple[Tensor, ...],
    mass: Tensor,
    mask: Tensor,
    rate: float,
    decay: float,
    top_k: int | None,
    epsilon: float,
    iterations: int,
) -> tuple[Tensor, ...]:
    """As the public op, for float32 and float64; returns the read, peak, entropy, and the state's tensors."""
    key, value, strength, pending_key, pending_value, pending_mass, position = state
    T, dk = q.shape[2:]
    S, dv = pending_key.shape[2], v.shape[-1]
    counts = mask.sum(1)
    place = torch.where(mask, position[:, None] + mask.cumsum(1) - 1, -1)  # [B, T]
    n, eager = -(-(S - 1 + T) // S), q.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager:
        n = -(-int((position + counts).max()) // S) or 1
    blocks = _Blocks(place, n, S)
    queries = blocks.put(q)
    keys = blocks.put(k, pending_key)  # [B, H, n, S, dk]
    values = blocks.put(v, pending_value)
    masses = blocks.put((mass * mask)[:, None, :, None], pending_mass[:, None, :, None])[:, 0, ..., 0]  # [B, n, S]

    done = (position + counts) // S  # [B] blocks that are full
    slots = torch.cat([key, value, strength[..., None]], -1)  # [B, H, M, dk + dv + 1]
    if eager and not done.any():  # most single tokens: n = 1 and nothing is moved yet
        before, last = slots[:, :, None], slots
    else:
        cost = 1 - F.normalize(keys, dim=-1) @ F.normalize(prototypes, dim=-1).mT[:, None]  # [B, H, n, S, M]
        plan = sinkhorn(cost, masses[:, None].expand(cost.shape[:-1]), epsilon, iterations)
        full = (torch.arange(n, device=q.device) < done[:, None])[:, None, :, None, None]  # [B, 1, n, 1, 1]
        before, last = _move(rate * plan * full, keys, values, slots, full[..., 0] * q.new_tensor(math.log(decay)))
    key, value, strength = last.split([dk, dv, 1], -1)

    K, V, Z = before.split([dk, dv, 1], -1)
    read, *scores = (blocks.take(x) for x in _read(queries, K, V, Z[..., 0], top_k))
    rest = [blocks.tail(x, done) for x in (keys, values, masses[:, None, ..., None])]
    kept = (torch.arange(S, device=q.device) < ((position + counts) % S)[:, None])[:, None, :, None]
    rest = [x * kept for x in rest]
    return (
        read,
        *(x[..., 0] for x in scores),
        key,
        value,
        strength[..., 0],
        rest[0],
        rest[1],
        rest[2][:, 0, :, 0],
        (position + counts) % S,
    )


def _move(plan: Tensor, keys: Tensor, values: Tensor, slots: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """What the slots hold before each block [B, H, n, M, d] and after the last [B, H, M, d], d = dk + dv + 1.

    plan is [B, H, n, S, M], zero for blocks that are not full, as log_decay [B, 1, n, 1] is.
    """
    S = plan.shape[3]
    log_decay = log_decay.to(plan.dtype)
    keep = (1 - plan.sum(-2)) * (S * log_decay).exp()  # [B, H, n, M]
    age = torch.arange(S, 0, -1, dtype=plan.dtype, device=plan.device)
    plan = plan * (age[:, None] * log_decay[..., None]).exp()
    moved = plan.mT @ torch.cat([keys, values, torch.ones_like(keys[..., :1])], -1)  # [B, H, n, M, d]
    moved, keep = moved.transpose(1, 2), keep.transpose(1, 2)[..., None]  # [B, n, H, M, .]
    after, last = linear_scan(keep.expand_as(moved).flatten(2), moved.flatten(2), slots.flatten(1))
    before = torch.cat([slots[:, None], after.view(moved.shape)[:, :-1]], 1).transpose(1, 2)
    return before, last.view(slots.shape)


def _read(q: Tensor, key: Tensor, value: Tensor, strength: Tensor, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [..., S, dk] over slots [..., M, d] of strength [..., M]: the read, peak and entropy."""
    strength = strength.flatten(0, 1)
    some = strength > 0
    filled = torch.where(some, strength, 1.0)
    log_strength = torch.where(some, filled.log(), -torch.inf)
    w = slot_weights(q.flatten(0, 1), key.flatten(0, 1), log_strength, top_k).view(*q.shape[:-1], -1)
    value = value / filled.view(value.shape[:-1])[..., None]
    return w @ value, w.amax(-1, keepdim=True), torch.special.entr(w.detach()).sum(-1, keepdim=True)


class _Blocks:
    """Tokens [B, H, T, d] to their places in blocks [B, H, n, S, d], and back; pads have no place."""

    def __init__(self, place: Tensor, n: int, S: int) -> None:
        self.place, self.n, self.S = place, n, S

    def put(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """With what was pending in the first places of the first block; its own places are free there."""
        B, H, _, d = x.shape
        places = self.n * self.S
        out = x.new_zeros(B, H, places + 1, d)  # the last place takes the pads
        if pending is not None:
            out = torch.cat([pending, x.new_zeros(B, H, places + 1 - self.S, d)], 2)
        index = torch.where(self.place < 0, places, self.place)[:, None, :, None].expand_as(x)
        return out.scatter(2, index, x)[:, :, :places].unflatten(2, (self.n, self.S))

    def take(self, y: Tensor) -> Tensor:
        """[B, H, n, S, d] -> [B, H, T, d], zero at pads."""
        y = F.pad(y.flatten(2, 3), (0, 0, 0, 1))
        index = torch.where(self.place < 0, self.n * self.S, self.place)[:, None, :, None]
        return y.gather(2, index.expand(-1, y.shape[1], -1, y.shape[3]))

    def tail(self, x: Tensor, done: Tensor) -> Tensor:
        """The block after the `done` [B] full ones; what is there if there is none does not matter."""
        index = done.clamp(max=self.n - 1).view(-1, 1, 1, 1, 1).expand(-1, x.shape[1], 1, *x.shape[3:])
        return x.gather(2, index)[:, :, 0]
