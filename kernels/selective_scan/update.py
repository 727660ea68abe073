"""One token of the selective scan, for decoding: Mamba (arXiv 2312.00752), equation 2a-2b for a single t."""

import torch
from torch import Tensor

from memzoo.kernels.selective_scan import fused, reference
from memzoo.kernels.selective_scan.common import check_tensor, compute_dtype


def selective_scan_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """state' = exp(delta A) * state + delta B u,   y = (C . state' + D u) * silu(z).

    Shapes: state [batch, channels, states]; u, delta, z [batch, channels]; A [channels, states]; B, C [batch, states];
    D, delta_bias [channels]. Returns y in u's dtype and a new state (float32, or float64 for float64 inputs); the
    given state is never written to. Differentiable. Raises ValueError for a wrong shape.
    """
    if u.dim() != 2 or A.dim() != 2:
        raise ValueError(
            f"u must be [batch, channels] and A [channels, states], got shapes {list(u.shape)} and {list(A.shape)}"
        )
    batch, channels = u.shape
    states = A.shape[1]
    check_tensor("state", state, (batch, channels, states), u.device)
    check_tensor("A", A, (channels, states), u.device)
    for name, x in (("delta", delta), ("z", z)):
        check_tensor(name, x, (batch, channels), u.device)
    for name, x in (("B", B), ("C", C)):
        check_tensor(name, x, (batch, states), u.device)
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        check_tensor(name, x, (channels,), u.device)

    return single_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def single_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_update` without the checks: Numba on CPU without autograd, torch operators otherwise."""
    dtype = compute_dtype(u)
    arguments = (state, u, delta, A, B, C, D, z, delta_bias)
    arguments = [x if x is None or x.dtype == dtype else x.to(dtype) for x in arguments]
    eager = u.device.type == "cpu" and not torch.compiler.is_compiling() and fused.is_available()
    if eager and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments)):
        y, state = fused.step(*arguments, delta_softplus)
    else:
        y, state = reference.step(*arguments, delta_softplus)
    return y.to(u.dtype), state
