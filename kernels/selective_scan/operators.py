"""The selective scan as torch.library operators `memzoo::selective_scan` and `memzoo::selective_scan_backward`.

torch.compile and torch.export see one opaque node with a shape function and a gradient. First-order gradients only.
"""

import torch
from torch import Tensor

from memzoo.kernels.selective_scan.common import CHUNK, ScanInputs, compute_dtype


def _implementation(name: str):
    if name == "triton":
        from memzoo.kernels.selective_scan import triton

        return triton
    from memzoo.kernels.selective_scan import chunked, fused

    return {"chunked": chunked, "fused": fused}[name]


@torch.library.custom_op("memzoo::selective_scan", mutates_args=())
def scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    delta_softplus: bool,
    implementation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [B, I, T], the final state [B, I, N] and, if save, the states at chunk starts for the backward."""
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus)
    with torch.autocast(u.device.type, enabled=False):
        y, final, starts = _implementation(implementation).forward(inputs.in_compute_dtype(), save)
    return y.to(u.dtype), final, starts


@scan_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus, implementation, save):
    batch, channels, time = u.shape
    dtype = compute_dtype(u)
    chunks = (time + CHUNK - 1) // CHUNK if save else 0
    y = u.new_empty(batch, time, channels).transpose(1, 2)
    states = u.new_empty(batch, channels, A.shape[1], dtype=dtype)
    return y, states, u.new_empty(batch, chunks, channels * A.shape[1], dtype=dtype)


@torch.library.custom_op("memzoo::selective_scan_backward", mutates_args=())
def scan_backward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    starts: Tensor,
    grad_y: Tensor,
    grad_final: Tensor | None,
    delta_softplus: bool,
    implementation: str,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state in their dtypes; empty for an absent input."""
    given = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, mask, delta_softplus)
    inputs = given.in_compute_dtype()
    module = _implementation(implementation)
    with torch.autocast(u.device.type, enabled=False):
        if starts.shape[1] == 0:  # the forward ran without knowing of the gradient
            starts = module.forward(inputs, save=True)[2]
        gradients = module.backward(inputs, starts, grad_y.to(inputs.u.dtype), grad_final)
    return [
        u.new_empty(0) if x is None else _laid_out(gradient.to(x.dtype), sequence=i in (0, 1, 3, 4, 6))
        for i, (x, gradient) in enumerate(zip(given[:9], gradients))
    ]


def _laid_out(x: Tensor, sequence: bool) -> Tensor:
    """Sequences [B, I or N, T] come with contiguous channels, everything else contiguous (as the fake says)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if sequence else x.contiguous()


@scan_backward_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, *_):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [
        u.new_empty(0) if x is None else _laid_out(x.new_empty(x.shape), sequence=i in (0, 1, 3, 4, 6))
        for i, x in enumerate(inputs)
    ]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.implementation, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_final, _grad_starts):
    *tensors, starts = ctx.saved_tensors
    if grad_y is None and grad_final is None:
        return (None,) * 13
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = scan_backward_op(*tensors, starts, grad_y, grad_final, ctx.delta_softplus, ctx.implementation)
    needed = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad))
    return (*needed, None, None, None, None)


scan_op.register_autograd(_backward, setup_context=_setup_context)
