"""The neural memory on the CPU through the compiled loops of walk.py and walk_backward.py. Numba is optional."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.neural_memory.arguments import (
    NO_MASK,
    block_size,
    in_rows,
    matrix_places,
    rule,
    segment_chunks,
    token_places,
    whole,
)
from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_parts

__all__ = ["is_available", "neural_memory_fused"]


def _layers(matrices: Sequence[Any], depth: int) -> list[Any]:
    """One group of matrices after the other, W, S and so on."""
    return [matrices[i : i + depth] for i in range(0, len(matrices), depth)]


def _sizes(tokens: int, continued: bool, chunk: int) -> tuple[int, int, int]:
    """Segments, blocks and tokens in a block."""
    chunks = -(-(tokens + (chunk - 1 if continued else 0)) // chunk)
    return -(-chunks // segment_chunks(chunk)), chunks * -(-chunk // block_size(chunk)), min(chunk, block_size(chunk))


def _kept(q, position, widths, chunk_size, save) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of what a forward keeps: states at the starts of all segments but the first, and hidden values."""
    B, H, T, _ = q.shape
    segments, blocks, n = _sizes(T, position is not None, chunk_size) if save else (1, 0, 0)
    size = sum(a * b for a, b in pairwise(widths))
    return (B * H, segments - 1, 2, size), (B * H, blocks, 3 * sum(widths[1:-1]) + widths[-1], n)


def _empty(q: Tensor, v: Tensor, matrices: Sequence[Tensor], depth: int) -> list[Tensor]:
    """y, in the order of a layer's tokens, and W, S and start after the call."""
    B, H, T, _ = q.shape
    y = v.new_empty(B, T, H, v.shape[3]).transpose(1, 2)
    return [y, *(_dense(x) for _ in range(3) for x in matrices[:depth])]


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _loop_arguments(q, places, matrices, mask, position, kept, hidden, widths, options):
    """The compiled loops' arguments, and the work of a call."""
    B, H, T, _ = q.shape
    mask = NO_MASK if mask is None else mask.contiguous().numpy()
    position = np.zeros(B, np.int64) if position is None else position.contiguous().numpy()
    arrays = (places, matrices, mask, position, kept.numpy(), hidden.numpy())
    size = sum(a * b for a, b in pairwise(widths))
    return (*arrays, (B, T, H), rule(q.dtype, tuple(widths), *options)), B * T * H * size


def _forward(
    tokens: Sequence[Tensor],
    matrices: Sequence[Tensor],
    mask: Tensor | None,
    position: Tensor | None,
    widths: Sequence[int],
    chunk_size: int,
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
    detach_every: int | None,
    normalize: bool,
    save: bool,
) -> list[Tensor]:
    """tokens: q, k, v, alpha, eta, theta. matrices: those of W, of S and, where it is not W, of start.

    Returns y, the matrices after the call, and for the backward the states at segment starts and the hidden values."""
    from memzoo.kernels.neural_memory import walk

    depth, (q, _, v) = len(widths) - 1, tokens[:3]
    rows, given = [*map(in_rows, tokens[:3]), *tokens[3:]], _layers([*map(whole, matrices)], depth)
    y, *after = _empty(q, v, matrices, depth)
    if mask is not None:
        y.zero_()
    kept, hidden = (q.new_empty(shape) for shape in _kept(q, position, widths, chunk_size, save))
    options = (chunk_size, clip, threshold, activation, residual, own_write, detach_every, normalize)
    groups = matrix_places(*given[:2], given[-1] if len(given) == 3 else given[0], *_layers(after, depth))
    call = _loop_arguments(q, token_places([*rows, y]), groups, mask, position, kept, hidden, widths, options)
    run_parts(walk.forward, walk.forward_region, *call)
    return [y, *after, kept, hidden]


_forward_op = torch.library.custom_op("memzoo::neural_memory_fused", _forward, mutates_args=())


@_forward_op.register_fake
def _(tokens, matrices, mask, position, widths, chunk_size, *options):
    q, v = tokens[0], tokens[2]
    kept = (q.new_empty(shape) for shape in _kept(q, position, widths, chunk_size, options[-1]))
    return [*_empty(q, v, matrices, len(widths) - 1), *kept]


def _backward(
    grads: Sequence[Tensor | None],
    tokens: Sequence[Tensor],
    matrices: Sequence[Tensor],
    kept: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    widths: Sequence[int],
    chunk_size: int,
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
    detach_every: int | None,
    normalize: bool,
) -> list[Tensor]:
    """From gradients of y and of the matrices after the call: those of q, k and v, of the gates [3, B, H, T], and of
    the matrices."""
    from memzoo.kernels.neural_memory import walk_backward

    depth, q = len(widths) - 1, tokens[0]
    d_y = tokens[2].new_zeros(tokens[2].shape) if grads[0] is None else grads[0]
    rows = [*map(in_rows, tokens[:3]), *tokens[3:], in_rows(d_y)]
    given = _layers([*map(whole, matrices)], depth)
    after = _layers([None if x is None else whole(x) for x in grads[1:]], depth)
    outputs = _empty_grads(tokens, matrices)
    if mask is not None:
        for x in outputs[:4]:
            x.zero_()
    d_tokens, d_matrices = outputs[:4], _layers(outputs[4:], depth)
    if len(given) == 2:
        given, d_matrices = [*given, given[0]], [*d_matrices, [None] * depth]
    options = (chunk_size, clip, threshold, activation, residual, own_write, detach_every, normalize)
    places, groups = token_places([*rows, *d_tokens]), matrix_places(*given, *after, *d_matrices)
    call = _loop_arguments(q, places, groups, mask, position, kept, hidden, widths, options)
    run_parts(walk_backward.backward, walk_backward.backward_region, *call)
    return outputs


def _empty_grads(tokens, matrices):
    q, alpha = tokens[0], tokens[3]
    rows = (x.new_empty(*(x.shape[i] for i in (0, 2, 1, 3))).transpose(1, 2) for x in tokens[:3])
    return [*rows, q.new_empty(3, *alpha.shape), *map(_dense, matrices)]


_backward_op = torch.library.custom_op("memzoo::neural_memory_fused_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(grads, tokens, matrices, *_):
    return _empty_grads(tokens, matrices)


def _save(ctx, inputs, output) -> None:
    tokens, matrices, mask, position, *ctx.options, _ = inputs
    ctx.save_for_backward(*tokens, *matrices, *output[-2:], mask, position)
    ctx.mark_non_differentiable(*output[-2:])


def _saved(ctx) -> tuple:
    *tensors, kept, hidden, mask, position = ctx.saved_tensors
    return tensors[:6], tensors[6:], kept, hidden, mask, position, *ctx.options


def _grads(ctx, backward, grads) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the six tensors of tokens, and of the matrices."""
    *d_rows, d_gates = (outputs := backward(grads, *_saved(ctx)))[:4]
    return [*d_rows, *d_gates.unbind(0)], outputs[4:]


def _op_backward(ctx, grads):
    return *_grads(ctx, _backward_op, grads[:-2]), *(None,) * 12


_forward_op.register_autograd(_op_backward, setup_context=_save)


class _Memory(torch.autograd.Function):
    """The op in eager mode, without its dispatch."""

    @staticmethod
    def forward(ctx: Any, mask, position, options, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        *outputs, kept, hidden = _forward(tensors[:6], tensors[6:], mask, position, *options, True)
        ctx.save_for_backward(*tensors, kept, hidden, mask, position)
        ctx.options = options
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_tokens, d_matrices = _grads(ctx, _backward, grads)
        return None, None, None, *d_tokens, *d_matrices


def neural_memory_fused(
    tokens: list[Tensor],
    gates: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    start: list[Tensor] | None,
    chunk_size: int,
    mask: Tensor | None,
    position: Tensor | None,
    options: tuple,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """tokens and gates (alpha, eta, theta) [B, H, T, ...], matrices [B, H, out, in], float32 or float64 on the CPU;
    mask is bool.

    Returns y, weights, momentum and start; `options` are those of the public op from clip on."""
    matrices = [*weights, *momentum, *(start or [])]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *gates, *matrices))
    options = ([weights[0].shape[-1], *(x.shape[-2] for x in weights)], chunk_size, *options)
    if torch.compiler.is_compiling():
        y, *after = _forward_op([*tokens, *gates], matrices, mask, position, *options, save)
    elif save:
        y, *after = _Memory.apply(mask, position, options, *tokens, *gates, *matrices)
    else:
        y, *after = _forward([*tokens, *gates], matrices, mask, position, *options, save)
    W, S, first = _layers(after[: 3 * len(weights)], len(weights))
    return y, W, S, first
