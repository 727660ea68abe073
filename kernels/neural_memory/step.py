"""One token of the neural memory: closed form in plain torch operators, so that autograd can follow it."""

import torch
from torch import Tensor

from memzoo.kernels.neural_memory.activation import ACTIVATIONS, Activation
from memzoo.kernels.neural_memory.segment import steps


def _network(weights: list[Tensor], x: Tensor, act: Activation) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs h_l and outputs z_l of every layer; x [G, 1, d]."""
    h, z = [x], [torch.bmm(x, weights[0].mT)]
    for weight in weights[1:]:
        h.append(act.value(z[-1]))
        z.append(torch.bmm(h[-1], weight.mT))
    return h, z


def neural_memory_read(q: Tensor, weights: list[Tensor], activation: str = "silu", residual: bool = False) -> Tensor:
    """f_W(q) without a write; q [B, H, T, dk], weights [B, H, out, in] -> [B, H, T, dv]."""
    x = q.flatten(0, 1)
    y = _network([w.to(x.dtype).flatten(0, 1) for w in weights], x, ACTIVATIONS[activation])[1][-1]
    return (y + x if residual else y).unflatten(0, q.shape[:2])


def neural_memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    eta: Tensor,
    theta: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    start: list[Tensor],
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """q, k, v [G, 1, d]; keep, eta, theta, mask [G, 1, 1]; returns y [G, 1, dv], weights and momentum [G, out, in]."""
    act = ACTIVATIONS[activation]
    h, z = _network(start, k, act)
    delta = [z[-1] - (v - k if residual else v)]
    for l in reversed(range(len(start) - 1)):
        delta.insert(0, torch.bmm(delta[0], start[l + 1]) * act.slope(z[l]))
    step = steps(theta.squeeze(-1), h, delta, clip, threshold)[..., None]
    momentum = [(eta * s).addcmul_((-step * d).mT, x) for s, d, x in zip(momentum, delta, h)]
    after = [(keep * w).addcmul_(mask, s) for w, s in zip(weights, momentum)]
    y = _network(after if own_write else weights, q, act)[1][-1]
    return y + q if residual else y, after, momentum
