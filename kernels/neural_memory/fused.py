"""The neural memory on the CPU through the compiled loops of loops.py and loops_backward.py. Numba is optional."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_tasks

SEGMENT = 128  # tokens between the states that a forward keeps for its backward

__all__ = ["is_available", "neural_memory_fused"]


@functools.cache
def _loops():
    from memzoo.kernels.neural_memory import elements, loops, loops_backward
    from memzoo.kernels.tiles import PAD

    return loops, loops_backward, elements.KINDS, PAD


@functools.cache
def _step_loop():
    from memzoo.kernels.neural_memory.step_loops import step

    return step


def block_size(chunk: int) -> int:
    """Tokens that are read and written at once."""
    return 32 if chunk >= 32 else 16


def _stride(chunk: int) -> int:
    return max(1, SEGMENT // chunk)


def _sizes(tokens: int, continued: bool, chunk: int) -> tuple[int, int, int]:
    """Segments, blocks and tokens in a block."""
    chunks = -(-(tokens + (chunk - 1 if continued else 0)) // chunk)
    return -(-chunks // _stride(chunk)), chunks * -(-chunk // block_size(chunk)), min(chunk, block_size(chunk))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _flat(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """[B, T, H, d] in place where d is contiguous, and the strides of B, T and H."""
    x = x.detach()
    if x.stride(3) != 1:
        x = x.contiguous()
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.as_strided((span,), (1,)).numpy(), x.stride()[:3]


@functools.cache
def _rule(dtype: torch.dtype, widths: tuple[int, ...], options: tuple):
    loops, _, kinds, pad = _loops()
    chunk, clip, threshold, activation, residual, own_write, detach_every, normalize = options
    real, widths = np.float32 if dtype == torch.float32 else np.float64, np.array(widths)
    return loops.Rule(
        widths, -(-widths // pad) * pad, chunk, block_size(chunk), _stride(chunk), kinds[activation],
        real(clip or 0), real(threshold or 0), residual, own_write, detach_every or 0, normalize,
        real(np.finfo(real).tiny ** 0.4),
    )  # fmt: skip


def _arguments(q, k, v, gates, mask, position, widths, options):
    mask = torch.empty(0, 0, dtype=torch.bool) if mask is None else mask
    position = torch.zeros(len(q), dtype=torch.int64) if position is None else position
    xs, strides = zip(*map(_flat, (q, k, v)))
    tokens = _loops()[0].Tokens(*xs, np.array(strides), *map(_array, (gates, mask, position)))
    return tokens, _rule(q.dtype, tuple(widths), options)


def _run(kernel, arguments, q: Tensor, size: int) -> None:
    B, T, H, _ = q.shape
    run_tasks(kernel, arguments, B * H, B * T * H * size)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    state: Tensor,
    start: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    widths: list[int],
    chunk_size: int,
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
    detach_every: int | None,
    normalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, d]; gates [3, B, H, T] keep, eta, theta; state [G, 2, size], start [G, 1, size].

    Returns y, the final state, the weights at the start of each row's last chunk, and for the backward the states at
    segment starts and the hidden values."""
    outputs = _empty(q, v, state, start, position, widths, chunk_size, save)
    if mask is not None:
        outputs[0].zero_()
    options = (chunk_size, clip, threshold, activation, residual, own_write, detach_every, normalize)
    tokens, rule = _arguments(q, k, v, gates, mask, position, widths, options)
    arrays = [_array(state), _array(start), *(x.numpy() for x in outputs)]
    _run(_loops()[0].forward, (tokens, rule, *arrays), q, state.shape[2])
    return outputs


def _empty(q, v, state, start, position, widths, chunk_size, save):
    G, _, size = state.shape
    segments, blocks, n = _sizes(q.shape[1], position is not None, chunk_size) if save else (0, 0, 0)
    rows = 3 * sum(widths[1:-1]) + widths[-1]
    new = state.new_empty
    return (
        new(v.shape), new(state.shape), new(start.shape), new(G, segments, 2, size), new(G, blocks, rows, n),
    )  # fmt: skip


_forward_op = torch.library.custom_op("memzoo::neural_memory_fused", _forward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, gates, state, start, mask, position, widths, chunk_size, *options):
    return _empty(q, v, state, start, position, widths, chunk_size, options[-1])


def _backward(
    d_y: Tensor,
    d_state: Tensor,
    d_start: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    start: Tensor,
    kept: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    widths: list[int],
    chunk_size: int,
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
    detach_every: int | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gates, state and start."""
    options = (chunk_size, clip, threshold, activation, residual, own_write, detach_every, normalize)
    tokens, rule = _arguments(q, k, v, gates, mask, position, widths, options)
    new = torch.empty if mask is None else torch.zeros
    outputs = [new(x.shape, dtype=x.dtype) for x in (q, k, v, gates)]
    outputs += [torch.empty(x.shape, dtype=x.dtype) for x in (d_state, d_start)]
    d_y, d_strides = _flat(d_y)
    arrays = [*map(_array, (start, kept, hidden)), d_y, np.array(d_strides), *map(_array, (d_state, d_start))]
    arrays += [x.numpy() for x in outputs]
    _run(_loops()[1].backward, (tokens, rule, *arrays), q, d_state.shape[2])
    return tuple(outputs)


_backward_op = torch.library.custom_op("memzoo::neural_memory_fused_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(d_y, d_state, d_start, q, k, v, gates, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gates, d_state, d_start))


def _save(ctx, inputs, output) -> None:
    q, k, v, gates, _, start, mask, position, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, v, gates, start, *output[3:], mask, position)
    ctx.mark_non_differentiable(*output[3:])


def _op_backward(ctx, d_y, d_state, d_start, *_):
    return *_backward_op(d_y, d_state, d_start, *ctx.saved_tensors, *ctx.options), *(None,) * 12


_forward_op.register_autograd(_op_backward, setup_context=_save)


def _join(*matrices: list[Tensor]) -> Tensor:
    """Lists of [B, H, out, in] -> [G, lists, size]."""
    return torch.cat([x.flatten(2) for xs in matrices for x in xs], 2).flatten(0, 1).unflatten(1, (len(matrices), -1))


def _parts(x: Tensor, like: list[Tensor]) -> list[list[Tensor]]:
    """The inverse of _join."""
    B, H = like[0].shape[:2]
    rows = [part.split([w.shape[-2:].numel() for w in like], 2) for part in x.unflatten(0, (B, H)).unbind(2)]
    return [[part.unflatten(2, w.shape[-2:]) for part, w in zip(row, like)] for row in rows]


class _Memory(torch.autograd.Function):
    """The op in eager mode: its dispatch, and torch's gradients of joining and cutting, cost more than short texts."""

    @staticmethod
    def forward(ctx: Any, mask, position, options, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, widths = _gathered(tensors)
        y, state, first, kept, hidden = _forward(*inputs, mask, position, widths, *options, True)
        q, k, v, gates, _, start = inputs
        ctx.save_for_backward(q, k, v, gates, start, kept, hidden, mask, position)
        ctx.options = (widths, *options)
        return _results(y, state, first, tensors[6::3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *d_matrices: Tensor) -> tuple[Tensor | None, ...]:
        d_W, d_S, d_first = (list(d_matrices[i::3]) for i in range(3))
        grads = _backward(d_y.transpose(1, 2), _join(d_W, d_S), _join(d_first), *ctx.saved_tensors, *ctx.options)
        d_tokens, d_gates, d_state, d_start = grads[:3], grads[3], *grads[4:]
        rows = zip(*_parts(d_state, d_W), *_parts(d_start, d_W))
        return (
            *(None,) * 3,
            *(x.transpose(1, 2) for x in d_tokens),
            *(-d_gates[:1]).unbind(0),
            *d_gates[1:].unbind(0),
            *(x for row in rows for x in row),
        )


def _gathered(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The op's inputs from q, k, v, alpha, eta, theta and, layer by layer, W, S and start."""
    q, k, v, alpha, eta, theta = tensors[:6]
    W, S, first = (list(tensors[i::3]) for i in (6, 7, 8))
    gates = torch.stack([1 - alpha, eta, theta])
    inputs = [*(x.transpose(1, 2) for x in (q, k, v)), gates, _join(W, S), _join(first)]
    return inputs, [W[0].shape[-1], *(x.shape[-2] for x in W)]


def _results(y: Tensor, state: Tensor, first: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    rows = zip(*_parts(state, list(like)), *_parts(first, list(like)))
    return y.transpose(1, 2), *(x for row in rows for x in row)


def neural_memory_fused(
    tokens: list[Tensor],
    gates: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    start: list[Tensor],
    chunk_size: int,
    mask: Tensor | None,
    position: Tensor | None,
    options: tuple,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """tokens and gates (alpha, eta, theta) [B, H, T, ...], matrices [B, H, out, in], float32 or float64 on the CPU;
    mask is bool.

    Returns y, weights, momentum and start; `options` are those of the public op from clip on."""
    tensors = (*tokens, *gates, *(x for row in zip(weights, momentum, start) for x in row))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    options = (chunk_size, *options)
    if save and not torch.compiler.is_compiling():
        y, *matrices = _Memory.apply(mask, position, options, *tensors)
    else:
        inputs, widths = _gathered(tensors)
        run = _forward_op if torch.compiler.is_compiling() else _forward
        y, state, first, _, _ = run(*inputs, mask, position, widths, *options, save)
        y, *matrices = _results(y, state, first, weights)
    return y, matrices[::3], matrices[1::3], matrices[2::3]


def neural_memory_step_fused(
    tokens: list[Tensor],
    gates: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    start: list[Tensor],
    mask: Tensor | None,
    options: tuple,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One token without autograd, T = 1: y, weights and momentum."""
    q, k, v = (x[:, :, 0] for x in tokens)
    mask = torch.empty(0, dtype=torch.bool) if mask is None else mask[:, 0]
    rule = _rule(q.dtype, (weights[0].shape[-1], *(x.shape[-2] for x in weights)), (1, *options))
    y = torch.empty(v.shape, dtype=v.dtype)
    after = [[torch.empty(x.shape, dtype=x.dtype) for x in xs] for xs in (weights, momentum)]
    alpha, *others = gates
    arrays = [*map(_array, (q, k, v, torch.stack([1 - alpha, *others])[..., 0], mask))]
    matrices = [tuple(_array(x) for x in xs) for xs in (weights, momentum, start)]
    results = [tuple(x.numpy() for x in xs) for xs in after]
    work = q.shape[0] * q.shape[1] * sum(x.shape[-1] * x.shape[-2] for x in weights)
    run_tasks(_step_loop(), (*arrays, *matrices, rule, y.numpy(), *results), q.shape[0] * q.shape[1], work)
    return y[:, :, None], *after
