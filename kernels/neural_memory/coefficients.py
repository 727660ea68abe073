"""What a chunk's decays do to its tokens, shared by all matrices of a memory, and the gradient of that.

With keep = 1 - alpha, m the write mask and C tokens in a chunk,

    D_A[i, l] = prod_{l < j <= i} keep_j,   D_E[i, l] = prod_{l < j <= i} eta_j   (l = 0 is the chunk's start)
    P = D_A diag(m) D_E
    W_i = a_i W + b_i S - sum_{j <= i} P_ij theta_j g_j,   S_i = E_i S - sum_{j <= i} D_E[i, j] theta_j g_j

a and E are the first columns of D_A and D_E, b is that of P. They are products, not exponentials of log-sums:
alpha = 1 and eta = 0 are exact, and so are pads (keep = 1, eta = 1, m = 0).
"""

from typing import NamedTuple

import torch
from torch import Tensor


def flush_(x: Tensor) -> Tensor:
    """Zero what changes no sum (below 1e-15 in float32): products of it are denormal, which slows CPUs tenfold."""
    return torch.ops.aten.hardshrink.out(x, torch.finfo(x.dtype).tiny ** 0.4, out=x)


class Coefficients(NamedTuple):
    D: Tensor  # [2, batch, C, C + 1] D_A and D_E
    P: Tensor  # [batch, C, C + 1] b, then P
    mask: Tensor  # [batch, C, 1]

    def mix(self) -> Tensor:
        """[batch, 2, 2]: (W, S) at the chunk's end from (W, S) at its start."""
        a, E = self.D[:, :, -1, 0]
        return torch.stack([a, self.P[:, -1, 0], torch.zeros_like(a), E], -1).view(-1, 2, 2)

    def end(self) -> Tensor:
        """[batch, C, 2]: what each token's step adds to W and to S at the chunk's end."""
        return torch.stack([self.P[:, -1, 1:], self.D[1, :, -1, 1:]], -1)

    def read(self, own_write: bool) -> tuple[Tensor, Tensor]:
        """[batch, C, 2] factors of W and S and [batch, C, C] factors of the steps, at each token's read."""
        start, inside = torch.stack([self.D[0, :, :, 0], self.P[:, :, 0]], -1), self.P[:, :, 1:]
        if own_write:
            return start, inside
        start, inside = _down(start), _down(inside)
        start[:, 0, 0] = 1.0
        return start, inside


def _down(x: Tensor) -> Tensor:
    """The rows moved down by one, zeros in the first."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)


def _up(x: Tensor) -> Tensor:
    return torch.cat([x[..., 1:, :], torch.zeros_like(x[..., :1, :])], -2)


def _products(x: Tensor) -> Tensor:
    """[..., C] -> [..., C, C + 1]: prod_{l < j <= i} x_j at [i, l], l = 0 the start."""
    C = x.shape[-1]
    inside = torch.ones(C, C + 1, dtype=torch.bool, device=x.device).tril()  # 0-based j, at or after column l
    D = torch.where(inside, x[..., None], 1.0).cumprod(-2).tril_(1)
    return flush_(D)


def _products_backward(D: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x in `_products`: prod over l < j, j itself and j < i, without a division."""
    before = _down(D)
    before[:, 0, 0] = 1.0
    return torch.bmm(D[:, :, 1:].mT, grad.tril_(1)).mul_(before).sum(-1)


def coefficients(gates: Tensor, mask: Tensor) -> Coefficients:
    """gates [2, batch, C]: keep and eta; mask [batch, C]."""
    D, mask = _products(gates), mask[..., None]
    return Coefficients(D, torch.bmm(D[0, :, :, 1:], mask * D[1]), mask)


def coefficients_backward(
    c: Coefficients, d_mix: Tensor, d_end: Tensor, d_A: Tensor, d_P: Tensor, own_write: bool
) -> Tensor:
    """The gradient of gates from those of `mix`, `end` and of what `read` took from D_A (column 0 only) and P."""
    if not own_write:
        d_A, d_P = _up(d_A), _up(d_P)
    d_P[:, -1, 1:] += d_end[..., 0]
    d_P[:, -1, 0] += d_mix[:, 0, 1]
    d_A[:, :, 1:] = torch.bmm(d_P, (c.mask * c.D[1]).mT)
    d_A[:, -1, 0] += d_mix[:, 0, 0]
    d_E = torch.bmm(c.D[0, :, :, 1:].mT, d_P).mul_(c.mask)
    d_E[:, -1, 1:] += d_end[..., 1]
    d_E[:, -1, 0] += d_mix[:, 1, 1]
    return torch.stack([_products_backward(D, grad) for D, grad in zip(c.D, (d_A, d_E))])
