"""Causal depthwise convolution with a carried tail: the short convolution of Mamba (arXiv 2312.00752), section 3.4."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.selective_scan import fused
from memzoo.kernels.selective_scan.common import check_tensor, compute_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_w weight_w x_{t - W + 1 + w}), with x before the first step taken from initial_state.

    Shapes: x [batch, channels, time]; weight [channels, W]; bias [channels]; initial_state [batch, channels, W - 1],
    the last W - 1 inputs so far (zeros if None); mask [batch, time], 1 at real tokens, which must come first in each
    row (pads on the right only; not checked): pads then reach no real output, and y at pads is meaningless.

    Returns y in x's shape and dtype and the final tail [batch, channels, W - 1]: each row's last W - 1 real inputs,
    reaching back into initial_state where a row has fewer. Raises ValueError for a wrong shape or time = 0.
    """
    _check(x, weight, bias, initial_state, mask, activation)
    tail = x.new_zeros(x.shape[0], x.shape[1], weight.shape[1] - 1) if initial_state is None else initial_state
    tail = tail.to(x.dtype)
    dtype = compute_dtype(x)
    arguments = [v if v is None or v.dtype == dtype else v.to(dtype) for v in (x, weight, bias, tail)]
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling() and fused.is_available()
    with_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in arguments)
    if eager and x.shape[2] == 1 and mask is None and not with_grad:
        y, tail = fused.conv_step(arguments[0][..., 0], *arguments[1:], activation == "silu")
        return y[..., None].to(x.dtype), tail.to(x.dtype)
    if eager and x.shape[2] > 1:
        y = _FusedConv.apply(*arguments, activation == "silu")
    else:
        y = _shifted_products(*arguments)
        y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), _final_tail(x, tail, mask)


def causal_conv1d_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d`: x [batch, channels], state its tail [batch, channels, W - 1], never written to.

    Returns y [batch, channels] and the new tail in x's dtype. Raises ValueError for a wrong shape.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [batch, channels], got shape {list(x.shape)}")
    y, tail = causal_conv1d(x[..., None], weight, bias, state, activation=activation)
    return y[..., 0], tail


def _check(x, weight, bias, initial_state, mask, activation) -> None:
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            "x must be [batch, channels, time] and weight [channels, width], "
            f"got shapes {list(x.shape)} and {list(weight.shape)}"
        )
    batch, channels, time = x.shape
    if time == 0:
        raise ValueError("x has no time step (shape [batch, channels, 0]); causal_conv1d needs at least one")
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    check_tensor("weight", weight, (channels, weight.shape[1]), x.device)
    check_tensor("bias", bias, (channels,), x.device)
    check_tensor("initial_state", initial_state, (batch, channels, weight.shape[1] - 1), x.device)
    check_tensor("mask", mask, (batch, time), x.device)


def _shifted_products(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> Tensor:
    """Before the activation, [B, I, T]. On CPU faster than F.conv1d, whose depthwise backward is slow."""
    window = torch.cat((tail, x), dim=-1)  # [B, I, W - 1 + T]
    if x.shape[2] == 1:
        y = (window * weight).sum(-1, keepdim=True)
        return y if bias is None else y + bias[:, None]
    window = window.transpose(1, 2)  # [B, W - 1 + T, I]
    y = window[:, : x.shape[2]] * weight[:, 0]
    if bias is not None:
        y = y + bias
    for w in range(1, weight.shape[1]):
        y = torch.addcmul(y, window[:, w : w + x.shape[2]], weight[:, w])
    return y.transpose(1, 2)


def _final_tail(x: Tensor, tail: Tensor, mask: Tensor | None) -> Tensor:
    """The last W - 1 real inputs of each row, as a copy: a view would keep the whole sequence alive in a cache."""
    time, kept = x.shape[2], tail.shape[2]
    if mask is None:
        if time >= kept:
            return x[:, :, time - kept :].clone(memory_format=torch.contiguous_format)
        return torch.cat((tail[:, :, time:], x), dim=-1)
    lengths = mask.bool().sum(-1, keepdim=True)  # [B, 1]
    position = lengths - kept + torch.arange(kept, device=x.device)  # [B, W - 1], negative: in the old tail
    from_x = x.gather(2, position.clamp(min=0)[:, None].expand(-1, x.shape[1], -1))
    from_tail = tail.gather(2, (position + kept).clamp(max=kept - 1)[:, None].expand(-1, x.shape[1], -1))
    return torch.where(position[:, None] < 0, from_tail, from_x)


class _FusedConv(torch.autograd.Function):
    """Numba on CPU, activation included; the backward recomputes the value before it."""

    @staticmethod
    def forward(ctx, x, weight, bias, tail, use_silu):
        ctx.save_for_backward(x, weight, bias, tail)
        ctx.use_silu = use_silu
        return fused.conv_forward(x, weight, bias, tail, use_silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, tail = ctx.saved_tensors
        gradients = fused.conv_backward(x, weight, bias, tail, grad_y, ctx.use_silu)
        return (*(g if need else None for g, need in zip(gradients, ctx.needs_input_grad)), None)
