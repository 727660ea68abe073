"""Entropic optimal transport of tokens to slots (Cuturi 2013, arXiv 1306.0895, algorithm 1)."""

import torch
from torch import Tensor


def sinkhorn(cost: Tensor, mass: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The plan that minimises <plan, cost> - epsilon entropy, where tokens give their mass and slots hold up to 1.

    What the tokens do not fill of the M slots comes from one more row of cost 0, which keeps the marginals balanced.
    With epsilon -> 0 and masses of 1 this is the cheapest assignment. The last step scales the slots, so that none
    ever holds more than 1; the tokens' masses are then met up to what convergence leaves.

    Args:
        cost: [..., S, M], a range of at most 80 epsilon per row in float32. mass: [..., S] in [0, 1], S <= M.

    Returns:
        The tokens' rows of the plan, [..., S, M].
    """
    M = cost.shape[-1]
    kernel = torch.exp((cost.amin(-1, keepdim=True) - cost) / epsilon)  # a row's factor is absorbed by its scale
    rest = (M - mass.sum(-1, keepdim=True)).clamp(min=torch.finfo(cost.dtype).tiny)
    columns = torch.ones_like(cost[..., 0, :])  # [..., M]
    for _ in range(iterations):
        rows = mass / (kernel @ columns[..., None]).squeeze(-1)
        columns = 1 / ((rows[..., None, :] @ kernel).squeeze(-2) + rest / columns.sum(-1, keepdim=True))
    return rows[..., None] * kernel * columns[..., None, :]
