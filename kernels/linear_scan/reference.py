"""The definition of the linear recurrence: a plain loop."""

import torch
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t; a, b [B, T, H], initial_state [B, H] -> h [B, T, H], h_T [B, H]."""
    h, states = initial_state, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, dim=1), h
