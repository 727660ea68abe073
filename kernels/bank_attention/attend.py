"""Softmax attention of rows over one chapter, with the logarithm of its sum, and its gradient.

On the CPU this is PyTorch's own fused kernel, the one behind `scaled_dot_product_attention`.
"""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [b, Hk, rows, d], k, v [Hk, keys, d] -> [b, Hk, rows, d] and, in float32 or better, [b, Hk, rows]."""
    if q.device.type == "cpu":
        k, v = (x.expand(q.shape[0], *x.shape) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).mT * scale
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp() @ v.to(wide)).to(q.dtype), lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; `out` and `lse` may be those of a softmax over more keys than these."""
    if q.device.type == "cpu":
        keys, values = (x.expand(q.shape[0], *x.shape) for x in (k, v))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, keys, values, out, lse, 0.0, False, scale=scale
        )
        return dq, dk.sum(0), dv.sum(0)
    dtype, wide = q.dtype, lse.dtype
    grad, q, k, v, out = (x.to(wide) for x in (grad, q, k, v, out))
    p = (q @ k.mT * scale - lse[..., None]).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return tuple(x.to(dtype) for x in (ds @ k, (ds.mT @ q).sum(0), (p.mT @ grad).sum(0)))
