"""First-order linear recurrence h_t = a_t h_{t-1} + b_t, elementwise: what a minGRU (arXiv 2410.01201, eq. 5) is."""

import torch
from torch import Tensor

from memzoo.kernels.linear_scan.chunked import scan
from memzoo.kernels.linear_scan.reference import linear_scan as reference

__all__ = ["linear_scan", "reference"]


def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t over dim 1. A pad is a = 1, b = 0, exactly.

    Args:
        a, b: [B, T, H]. Half precision is computed in float32.
        initial_state: h_0 [B, H], zero when absent.

    Returns:
        h [B, T, H] in b's dtype and the final state [B, H] in at least float32.

    Raises:
        ValueError: shapes differ, or T is 0.
    """
    if a.shape != b.shape or a.ndim != 3 or a.shape[1] == 0:
        raise ValueError(
            f"linear_scan needs a and b of one shape [B, T > 0, H], not {list(a.shape)} and {list(b.shape)}"
        )
    state_dtype = torch.promote_types(b.dtype, torch.float32)
    if initial_state is None:
        initial_state = b.new_zeros(b.shape[0], b.shape[2], dtype=state_dtype)
    elif initial_state.shape != (b.shape[0], b.shape[2]):
        raise ValueError(f"initial_state is {list(initial_state.shape)}, expected {[b.shape[0], b.shape[2]]}")
    h0 = initial_state.to(state_dtype)
    if b.shape[1] == 1:
        h = torch.addcmul(b.to(state_dtype), a.to(state_dtype), h0[:, None])
    else:
        h = scan(a.to(state_dtype), b.to(state_dtype), h0, False)
    return h.to(b.dtype), h[:, -1]
