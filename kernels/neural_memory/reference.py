"""The definition of the neural memory: a loop over tokens, with gradients of the inner loss from autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION = {"silu": F.silu, "gelu": F.gelu}


def network(weights: list[Tensor], x: Tensor, activation: str, residual: bool) -> Tensor:
    """f_W(x): matrices [..., out, in] with the activation between them; x [..., in]."""
    h = x
    for i, weight in enumerate(weights):
        h = (weight @ (ACTIVATION[activation](h) if i else h)[..., None]).squeeze(-1)
    return h + x if residual else h


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    start: list[Tensor],
    position: Tensor,
    chunk_size: int,
    mask: Tensor | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    activation: str = "silu",
    residual: bool = False,
    read_own_write: bool = True,
    detach_every: int | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """As the public op; returns y, weights, momentum, start, position."""

    def loss(start: list[Tensor], k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (network(start, k, activation, residual) - v).square().sum()

    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask.bool()
    chunk, reads = torch.zeros_like(position), []
    for t in range(q.shape[2]):
        write = real[:, t, None, None, None]  # [B, 1, 1, 1]
        if detach_every is not None:
            cut = write & ((position == 0) & (chunk > 0) & (chunk % detach_every == 0))[:, None, None, None]
            weights, momentum, start = (
                [torch.where(cut, x.detach(), x) for x in xs] for xs in (weights, momentum, start)
            )
        gradients = torch.func.grad(loss)(start, k[:, :, t], v[:, :, t])
        step = theta[:, :, t]  # [B, H]
        if clip is not None:
            square = sum(g.square().sum((-2, -1)) for g in gradients)
            step = step * torch.where(square > clip**2, clip * square.clamp(min=clip**2).rsqrt(), 1.0)
        if threshold is not None:
            error = network(start, k[:, :, t], activation, residual) - v[:, :, t]
            step = step * (error.square().sum(-1) >= threshold)
        keep, decay, step = (x[..., None, None] for x in (1 - alpha[:, :, t], eta[:, :, t], step))
        before = weights
        momentum = [torch.where(write, decay * s - step * g, s) for s, g in zip(momentum, gradients)]
        weights = [torch.where(write, keep * w + s, w) for w, s in zip(weights, momentum)]
        y = network(weights if read_own_write else before, q[:, :, t], activation, residual)
        reads.append(y * real[:, t, None, None])
        position = position + real[:, t]
        full = position == chunk_size
        start = [torch.where(full[:, None, None, None], w, s) for w, s in zip(weights, start)]
        position, chunk = torch.where(full, 0, position), chunk + full
    return torch.stack(reads, dim=2), weights, momentum, start, position
