"""The activations of a memory's network, with first and second derivatives, for gradients of gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
NORMAL = 1 / math.sqrt(2 * math.pi)


class Activation(NamedTuple):
    value: Callable[..., Tensor]  # z, out=None
    slope: Callable[[Tensor], Tensor]  # differentiable
    backward: Callable[..., Tensor]  # g, z, grad_input: g * slope(z) in one pass
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # value, slope, second derivative; no autograd


def _silu_slope(z: Tensor) -> Tensor:
    s = z.sigmoid()
    return s + s * z * (1 - s)


def _silu_derivatives(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = z.sigmoid()
    h, rest = z * s, 1 - s
    slope = torch.addcmul(s, h, rest)
    return h, slope, s.sub_(s * h).add_(slope).mul_(rest)


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.erf(z * 0.5**0.5) + z * (NORMAL * torch.exp(-0.5 * z * z))


def _gelu_derivatives(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = (z * 0.5**0.5).erf_().mul_(0.5).add_(0.5)
    square = z * z
    density = (square * -0.5).exp_().mul_(NORMAL)
    return z * below, below.addcmul_(z, density), square.sub_(2).neg_().mul_(density)


ACTIVATIONS = {
    "silu": Activation(aten.silu, _silu_slope, aten.silu_backward, _silu_derivatives),
    "gelu": Activation(aten.gelu, _gelu_slope, aten.gelu_backward, _gelu_derivatives),
}
