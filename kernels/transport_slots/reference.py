"""The definition of transported writes: each sequence by itself, one token after another."""

import math

import torch
from torch import Tensor

from memzoo.kernels.slot_memory.reference import read_slots


def plan_of(cost: Tensor, mass: Tensor, epsilon: float, iterations: int) -> Tensor:
    """As `sinkhorn`, by potentials and logarithms. cost [H, n, M], mass [n] > 0."""
    H, _, M = cost.shape
    rest = cost.new_full((H, 1, M), 0.0)
    logits = -torch.cat([cost, rest], 1) / epsilon
    rows = torch.cat([mass, (M - mass.sum()).clamp(min=torch.finfo(cost.dtype).tiny)[None]]).log()
    g = cost.new_zeros(H, M)
    for _ in range(iterations):
        f = rows - torch.logsumexp(logits + g[:, None], 2)
        g = -torch.logsumexp(logits + f[:, :, None], 1)
    return (logits + f[:, :, None] + g[:, None]).exp()[:, :-1]


def transport_slots(
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
    """As the public op; returns the read, peak, entropy, and the state's tensors."""
    block = state[3].shape[2]
    unit = prototypes / prototypes.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # [H, M, dk]
    rows: list[list[Tensor]] = [[] for _ in range(10)]
    for b in range(q.shape[0]):
        key, value, strength, *pending, position = (x[b] for x in state)
        waiting = [tuple(p[..., i, :] if p.ndim == 3 else p[i] for p in pending) for i in range(int(position))]
        reads = []
        for t in range(q.shape[2]):
            some = strength.amax(0) > 0  # [M], a slot that was written
            zero = q.new_zeros(q.shape[1])
            if not mask[b, t] or not some.any():
                reads.append((torch.zeros_like(v[b, :, t]), zero, zero))
            else:
                seen = value[:, some] / strength[:, some, None]
                reads.append(read_slots(q[b, :, t], key[:, some], seen, strength[:, some].log(), top_k))
            if not mask[b, t]:
                continue
            waiting.append((k[b, :, t], v[b, :, t], mass[b, t]))
            if len(waiting) == block:
                keys, values, masses = (torch.stack(x, -2 if x[0].ndim else 0) for x in zip(*waiting))
                given = masses > 0
                moved = torch.zeros_like(strength)
                added = [torch.zeros_like(key), torch.zeros_like(value)]
                if given.any():
                    K = keys[:, given]
                    cost = 1 - (K / K.norm(dim=-1, keepdim=True).clamp(min=1e-12)) @ unit.mT
                    plan = plan_of(cost, masses[given], epsilon, iterations)  # [H, n, M]
                    age = torch.arange(block, 0, -1, dtype=k.dtype)[given]
                    aged = rate * plan * torch.exp(age * math.log(decay))[:, None]
                    moved, added = aged.sum(1), [aged.mT @ K, aged.mT @ values[:, given]]
                    keep = 1 - rate * plan.sum(1)
                else:
                    keep = torch.ones_like(strength)
                keep = keep * decay**block
                strength = keep * strength + moved
                key, value = (keep[..., None] * x + y for x, y in zip((key, value), added))
                waiting = []
        pending = [torch.zeros_like(p) for p in pending]
        for i, items in enumerate(waiting):
            pending = [
                p.index_copy(-2 if x.ndim else 0, torch.tensor([i]), x.unsqueeze(-2) if x.ndim else x[None])
                for p, x in zip(pending, items)
            ]
        after = (key, value, strength, *pending, torch.tensor(len(waiting)))
        for row, item in zip(rows, (*(torch.stack(x, 1) for x in zip(*reads)), *after)):
            row.append(item)
    return tuple(torch.stack(row) for row in rows)
