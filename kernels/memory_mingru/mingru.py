"""minGRU (arXiv 2410.01201, section 3.1) with tanh on the candidate: gates that do not read h, so a linear scan."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.linear_scan import linear_scan
from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_tasks


def mingru(gates: Tensor, h0: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z_t) h_{t-1} + z_t n_t with z, n = sigmoid, tanh of gates [B, T, 2H]; h [B, T, H] and h_T.

    mask [B, T], 0 leaves h exactly as it was. One compiled pass each way on the CPU with numba, torch's elsewhere.
    """
    eager = gates.device.type == "cpu" and not torch.compiler.is_compiling() and is_available()
    if eager and gates.dtype == h0.dtype and gates.dtype in (torch.float32, torch.float64):
        h = _Fused.apply(gates, h0, None if mask is None else mask.bool())
        return h, h[:, -1]
    update, candidate = gates.to(torch.promote_types(gates.dtype, torch.float32)).chunk(2, dim=-1)
    update = update.sigmoid()
    if mask is not None:
        update = update * mask[..., None]
    h, h_last = linear_scan(1 - update, update * candidate.tanh(), h0)
    return h.to(gates.dtype), h_last


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, h0: Tensor, mask: Tensor | None) -> Tensor:
        from memzoo.kernels.memory_mingru.mingru_loops import BLOCK, forward

        gates, h0 = gates.detach().contiguous(), h0.detach().contiguous()
        h = gates.new_empty(*gates.shape[:2], h0.shape[1])
        tasks = len(h) * -(-h.shape[2] // BLOCK)
        run_tasks(forward, (gates.numpy(), h0.numpy(), _array(mask), h.numpy()), tasks, 8 * h.numel())
        ctx.save_for_backward(gates, h0, mask, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        from memzoo.kernels.memory_mingru.mingru_loops import BLOCK, backward

        gates, h0, mask, h = ctx.saved_tensors
        d_gates, d_h0 = torch.empty_like(gates), torch.empty_like(h0)
        arrays = [x.numpy() for x in (grad.contiguous(), gates, h0, h, d_gates, d_h0)]
        run_tasks(backward, (*arrays, _array(mask)), len(h) * -(-h.shape[2] // BLOCK), 16 * h.numel())
        return d_gates, d_h0, None


def _array(mask: Tensor | None) -> Any:
    return (torch.empty(0, 0, dtype=torch.bool) if mask is None else mask.contiguous()).numpy()
