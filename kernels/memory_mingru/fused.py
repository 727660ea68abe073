"""One token of the cell in one compiled pass over the state, for decoding on the CPU. Needs numba, no compiler."""

from typing import Any

import torch
from torch import Tensor

from memzoo.kernels.selective_scan.fused import is_available as has_numba

READ_EPS = 1e-4  # on the mean square of what is read; an empty memory reads as zero


def is_available(x: Tensor, mask: Tensor | None, tensors: list[Tensor]) -> bool:
    """Whether this is a step for `step`: one real token, on the CPU, in float32 or float64, without gradients."""
    if not has_numba() or x.shape[1] != 1 or mask is not None or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.float64):
        return False
    same = all(tensor.dtype == x.dtype for tensor in tensors)
    return same and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def step(
    x: Tensor,
    h0: Tensor,
    M0: Tensor,
    weights: Any,
    router_bias: Tensor,
    top_k: int | None,
    shared_bank: bool,
    decay: float,
    slot_norm_cap: float | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """As the public op with T = 1; the given state is not written to."""
    from memzoo.kernels.memory_mingru import loops  # numba is optional, and compiles when used

    h, logits = torch.empty_like(h0), x.new_empty(x.shape[0], 1, weights.router_out.shape[0])
    M = torch.empty_like(M0, memory_format=torch.contiguous_format)
    bias = router_bias.to(x.dtype).expand(logits.shape)
    tensors = (x, h0, M0, *weights, bias, h, logits, M)
    options = (top_k or logits.shape[2], int(shared_bank), float(decay), float(slot_norm_cap or 0.0))
    loops.step(*(tensor.detach().contiguous().numpy() for tensor in tensors), *options)
    return h[:, None], logits, (h, M)
