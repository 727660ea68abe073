"""The neural memory on the CPU through the compiled loops of loops.py and loops_backward.py. Numba is optional."""

import functools

import numpy as np
import torch
from torch import Tensor

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


@torch.library.custom_op("memzoo::neural_memory_fused", mutates_args=())
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


@_forward.register_fake
def _(q, k, v, gates, state, start, mask, position, widths, chunk_size, *options):
    return _empty(q, v, state, start, position, widths, chunk_size, options[-1])


@torch.library.custom_op("memzoo::neural_memory_fused_backward", mutates_args=())
def _backward_op(
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


@_backward_op.register_fake
def _(d_y, d_state, d_start, q, k, v, gates, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gates, d_state, d_start))


def _save(ctx, inputs, output) -> None:
    q, k, v, gates, _, start, mask, position, *ctx.options, _ = inputs
    ctx.save_for_backward(q, k, v, gates, start, *output[3:], mask, position)
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, d_y, d_state, d_start, *_):
    return *_backward_op(d_y, d_state, d_start, *ctx.saved_tensors, *ctx.options), *(None,) * 12


_forward.register_autograd(_backward, setup_context=_save)


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
    """tokens and gates [B, H, T, ...], matrices [B, H, out, in], float32 or float64 on the CPU; mask is bool.

    Returns y, weights, momentum and start; `options` are those of the public op from clip on."""
    B, H = tokens[0].shape[:2]
    W, S, first = (torch.cat([x.flatten(2) for x in xs], 2).flatten(0, 1) for xs in (weights, momentum, start))
    inputs = [*(x.transpose(1, 2) for x in tokens), torch.stack(gates), torch.stack([W, S], 1), first[:, None]]
    widths = [weights[0].shape[-1], *(x.shape[-2] for x in weights)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, state, first, _, _ = _forward(*inputs, mask, position, widths, chunk_size, *options, save)
    parts = [
        x.unflatten(0, (B, H)).split([w.shape[-2:].numel() for w in weights], 2)
        for x in (*state.unbind(1), first[:, 0])
    ]
    return y.transpose(1, 2), *([x.unflatten(2, w.shape[-2:]) for x, w in zip(xs, weights)] for xs in parts)


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
    arrays = [*map(_array, (q, k, v, torch.stack(gates)[..., 0], mask))]
    matrices = [tuple(_array(x) for x in xs) for xs in (weights, momentum, start)]
    results = [tuple(x.numpy() for x in xs) for xs in after]
    work = q.shape[0] * q.shape[1] * sum(x.shape[-1] * x.shape[-2] for x in weights)
    run_tasks(_step_loop(), (*arrays, *matrices, rule, y.numpy(), *results), q.shape[0] * q.shape[1], work)
    return y[:, :, None], *after
