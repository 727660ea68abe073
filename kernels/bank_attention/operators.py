"""A routed read as torch.library operators, so that torch.compile and torch.export see one node with a gradient."""

import os

import torch
from torch import Tensor

from memzoo.kernels.available import has_triton
from memzoo.kernels.bank_attention import chunked, fused


def choose(implementation: str, device: str) -> str:
    """The name of the module that computes, from the caller's wish and the device."""
    if implementation == "auto":
        if device == "cuda":
            return "triton" if has_triton("bank_attention") else "chunked"
        return "fused" if device == "cpu" and fused.is_available() else "chunked"
    if implementation not in ("chunked", "fused", "triton"):
        raise ValueError(f"implementation must be auto, reference, chunked, fused or triton, not {implementation!r}")
    if implementation == "fused" and (device != "cpu" or not fused.is_available()):
        raise ValueError("implementation='fused' needs CPU tensors and Numba (pip install numba)")
    if implementation == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("implementation='triton' needs CUDA tensors (or TRITON_INTERPRET=1)")
    return implementation


def _module(implementation: str):
    if implementation == "triton":
        from memzoo.kernels.bank_attention import triton

        return triton
    return {"chunked": chunked, "fused": fused}[implementation]


@torch.library.custom_op("memzoo::bank_attention", mutates_args=())
def routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """q [n, H, d], k, v [Hk, N, d], chapters, log_weights [n, S]. Returns out [n, H, d], L [n, H] (0 if separate)."""
    options = (chapters, log_weights, size, shared, joint, scale)
    with torch.autocast(q.device.type, enabled=False):
        if implementation != "chunked":
            return _module(implementation).forward(q, k, v, *options)
        bank = (k.shape[1], k.shape[0], chunked.slices(k, v))
        return chunked.forward(q, bank, *options)


@routed.register_fake
def _(q, k, v, chapters, log_weights, size, shared, joint, scale, implementation):
    n, H, _ = q.shape
    return q.new_empty(n, H, v.shape[2]), log_weights.new_empty(n, H)


@torch.library.custom_op("memzoo::bank_attention_backward", mutates_args=())
def routed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    out: Tensor,
    lse: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
    router: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_weights."""
    with torch.autocast(q.device.type, enabled=False):
        return _module(implementation).backward(
            grad.contiguous(), q, k, v, chapters, log_weights, out, lse, size, shared, joint, scale, router
        )


@routed_backward.register_fake
def _(grad, q, k, v, chapters, log_weights, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_weights))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.size, ctx.shared, ctx.joint, ctx.scale, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _grad_lse):
    options = (ctx.size, ctx.shared, ctx.joint, ctx.scale, ctx.needs_input_grad[4], ctx.implementation)
    dq, dk, dv, dw = routed_backward(grad, *ctx.saved_tensors, *options)
    return dq, dk, dv, None, dw, *(None,) * 5


routed.register_autograd(_backward, setup_context=_save)
