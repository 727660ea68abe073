"""The neural memory by chunks of matrix products: Titans (arXiv 2501.00663), section 3.2, exact for every token.

All gradients of a chunk are taken at its first weights, so with h_l, delta_l the inputs and output gradients of layer
l at K, and coefficients a, b, P of `coefficients.py`, a token's weights need never exist:

    h~_l = act(a * (h~_{l-1} W_l') + b * (h~_{l-1} S_l') - [(h~_{l-1} h_{l-1}') * P] (theta * delta_l))

Index legend: N chunks of C tokens, G = batch * heads, tensors chunk-major [N G, C, d]. A layer's state is one tensor
[G, 2 out, in]: the rows of W, then those of S.

Only what feeds the next chunk runs chunk by chunk; the reads run for a segment of chunks at once. For the backward
(`backward.py`) the states at segment starts and the pre-activations are kept, the rest is recomputed.
"""

from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from memzoo.kernels.available import has_triton
from memzoo.kernels.neural_memory.activation import ACTIVATIONS
from memzoo.kernels.neural_memory.backward import Options, sequence_backward
from memzoo.kernels.neural_memory.coefficients import coefficients, flush_
from memzoo.kernels.neural_memory.segment import advance, read, scaled_rows, steps, surprise

SEGMENT = 64  # tokens: larger ones leave the cache, smaller ones make small products


def segments(chunks: int, C: int) -> list[tuple[int, int]]:
    size = max(1, SEGMENT // C)
    return [(c, min(c + size, chunks)) for c in range(0, chunks, size)]


def ending(ends: Tensor, C: int) -> dict[int, list[int]]:
    """Which groups have their last token in which chunk; a group that fills chunk c ends in c + 1."""
    groups: dict[int, list[int]] = {}
    for g, end in enumerate(ends.tolist()):
        groups.setdefault(end // C, []).append(g)
    return groups


def _triton(k: Tensor, v: Tensor, layers: int, clip: float | None, threshold: float | None) -> ModuleType | None:
    """The Triton form where it serves these inputs."""
    if not (k.is_cuda and has_triton("neural_memory")):
        return None
    from memzoo.kernels.neural_memory import triton

    return triton if triton.fits(k, v, layers, clip, threshold) else None


@torch.library.custom_op("memzoo::neural_memory", mutates_args=())
def neural_memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    theta: Tensor,
    mask: Tensor,
    state: list[Tensor],
    start: list[Tensor],
    ends: Tensor,
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
    detach_every: int | None,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """q, k, v [N G, C, d], gates [2, N G, C] keep and eta, theta, mask [N G, C], start [G, out, in], ends [G]: slots
    up to each group's last token.

    Returns y, the final state, the weights at the start of each group's last chunk, and what the backward needs.
    """
    G, C, L = state[0].shape[0], k.shape[1], len(state)
    N = k.shape[0] // G
    act, endings, pieces = ACTIVATIONS[activation], ending(ends, C), segments(N, C)
    target = v - k if residual else v
    c = coefficients(gates, mask)
    mix, end, (read_start, inside) = c.mix(), c.end(), c.read(own_write)
    size = pieces[0][1]  # chunks in a segment
    triton = _triton(k, target, L, clip, threshold)
    if triton is not None:
        factors = (theta, c, own_write, *state, *start, ends, size, save, clip, threshold)
        y, last, final, kept, err = triton.forward(q, k, target, *factors)
        return y + q if residual else y, [last], [final], [kept, err, c.D, c.P] if save else []
    widths = [x.shape[1] for x in start]
    kept = [x.new_empty(len(pieces) + 1 if save else 2, *x.shape) for x in state]  # states at segment starts
    within = [x.new_empty(size, *x.shape) if size > 1 else None for x in state]
    saved_rows = N * G if save else size * G
    hidden = [[k.new_empty(saved_rows, C, d) for d in widths[:-1]] for _ in range(3)]  # z, g and reads
    err = v.new_empty(saved_rows, *v.shape[1:])
    h = [k, *(k.new_empty(size * G, C, d) for d in widths[:-1])]
    delta = [*(torch.empty_like(x) for x in h[1:]), err]
    y, final_start = torch.empty_like(v), [torch.empty_like(x) for x in start]
    for to, x in zip(kept, state):
        to[0] = x
    for i, (c0, c1) in enumerate(pieces):
        n = c1 - c0
        here, local = slice(c0 * G, c1 * G), slice(0, n * G)
        first, after = ([x[(i + shift) % len(x)] for x in kept] for shift in (0, 1))
        z, g = ([x[here if save else local].split(G) for x in xs] for xs in hidden[:2])
        h_parts = [k[here].split(G), *(x[local].split(G) for x in h[1:])]
        errs = err[here if save else local]
        delta_parts = [*(x[local].split(G) for x in delta[:-1]), errs.split(G)]
        step = torch.empty_like(theta[here])
        states = [x[None] for x in first] if size == 1 else within
        if size > 1:
            for to, x in zip(within, first):
                to[0] = x
        for j in range(n):
            weights = [x[j, :, :d] for x, d in zip(states, widths)] if c0 + j else start
            for group in endings.get(c0 + j, ()):
                for to, x in zip(final_start, weights):
                    to[group] = x[group]
            at = slice((c0 + j) * G, (c0 + j + 1) * G)
            h_j, z_j, g_j, delta_j = ([x[j] for x in xs] for xs in (h_parts, z, g, delta_parts))
            surprise(weights, act, target[at], h_j, z_j, g_j, delta_j)
            w = steps(theta[at], h_j, delta_j, clip, threshold)
            step[j * G : (j + 1) * G] = w
            scaled = end[at] * w[..., None]
            for l in range(L):
                to = after[l] if j == n - 1 else states[l][j + 1]
                advance(states[l][j], mix[at], scaled_rows(delta_j[l], scaled), h_j[l], out=to)
        for x in after:
            flush_(x)
        flat = [x[:n].flatten(0, 1) for x in states]
        keys = [k[here], *(x[local] for x in h[1:])]
        deltas = [*(x[local] for x in delta[:-1]), errs]
        outputs = read(q[here], keys, deltas, flat, read_start[here], inside[here] * step[:, None], act)
        y[here] = outputs[-1]
        if save:
            for to, x in zip(hidden[2], outputs[:-1]):
                to[here] = x
    last = [x[len(pieces) % len(x)] for x in kept]
    for group in endings.get(N, ()):
        for to, x, d in zip(final_start, last, widths):
            to[group] = x[group, :d]
    if residual:
        y += q
    return y, [x.clone() for x in last], final_start, [*kept, *chain(*hidden), err, c.D, c.P] if save else []


@neural_memory_chunked.register_fake
def _(q, k, v, gates, theta, mask, state, start, ends, clip, threshold, activation, residual, own, detach, save):
    C = k.shape[1]
    pieces = len(segments(k.shape[0] // state[0].shape[0], C))
    hidden = [k.new_empty(k.shape[0], C, x.shape[1]) for _ in range(3) for x in start[:-1]]
    kept = [x.new_empty(pieces + 1, *x.shape) for x in state]
    products = [k.new_empty(2, k.shape[0], C, C + 1), k.new_empty(k.shape[0], C, C + 1)]
    saved = [*kept, *hidden, torch.empty_like(v), *products] if save else []
    return torch.empty_like(v), [torch.empty_like(x) for x in state], [torch.empty_like(x) for x in start], saved


@torch.library.custom_op("memzoo::neural_memory_backward", mutates_args=())
def _backward_op(
    d_y: Tensor,
    d_state: list[Tensor],
    d_final_start: list[Tensor],
    q: Tensor,
    k: Tensor,
    theta: Tensor,
    mask: Tensor,
    start: list[Tensor],
    ends: Tensor,
    saved: list[Tensor],
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
    detach_every: int | None,
) -> list[Tensor]:
    """Gradients of q, k, v, gates, theta, each layer's state and each layer's start."""
    G, C = start[0].shape[0], k.shape[1]
    N = k.shape[0] // G
    triton = _triton(k, d_y, len(start), clip, threshold)
    if triton is not None:
        size = segments(N, C)[0][1]
        rest = (saved, size, clip, threshold, own_write, detach_every)
        grads, *d_first = triton.backward(d_y, *d_state, *d_final_start, (q, k, theta, mask), *start, ends, *rest)
        if residual:
            grads[0] += d_y
            grads[1] -= grads[2]
        return [*grads, *d_first]
    endings = ending(ends, C)
    d_start = [torch.zeros_like(x) for x in start]

    def at_start(chunk: int, d_state: list[Tensor]) -> list[Tensor]:
        """The gradient at a chunk's start: add what comes from `final_start`, drop what truncation drops."""
        for group in endings.get(chunk, ()):
            for x, d in zip(d_state if chunk else d_start, d_final_start):
                x[group, : d.shape[1]] += d[group]
        if detach_every and chunk and chunk % detach_every == 0:
            beyond = (ends <= chunk * C)[:, None, None]  # groups that have no token in this chunk
            d_state = [torch.where(beyond, x, 0.0) for x in d_state]
        return d_state

    d_state = at_start(N, [x.clone(memory_format=torch.contiguous_format) for x in d_state])
    options = Options(clip, threshold, ACTIVATIONS[activation], own_write)
    inputs = (q, k, theta, mask)
    grads, d_state, first = sequence_backward(d_y, d_state, inputs, start, saved, segments(N, C), options, at_start)
    if residual:
        grads[0] += d_y
        grads[1] -= grads[2]
    return [*grads, *d_state, *(a + b for a, b in zip(d_start, first))]


@_backward_op.register_fake
def _(d_y, d_state, d_final, q, k, theta, mask, start, ends, saved, clip, threshold, act, residual, own, detach):
    gates = theta.new_empty(2, *theta.shape)
    return [torch.empty_like(x) for x in (q, k, d_y, gates, theta, *d_state, *start)]


def _save(ctx, inputs, output) -> None:
    q, k, _, _, theta, mask, _, start, ends, *ctx.options, _ = inputs
    ctx.layers = len(start)
    ctx.save_for_backward(q, k, theta, mask, ends, *start, *output[3])


def _backward(ctx, d_y, d_state, d_final_start, _):
    q, k, theta, mask, ends, *rest = ctx.saved_tensors
    L = ctx.layers
    args = (q, k, theta, mask, rest[:L], ends, rest[L:])
    grads = _backward_op(d_y.contiguous(), d_state, d_final_start, *args, *ctx.options)
    return *grads[:5], None, grads[5 : 5 + L], grads[5 + L :], None, *(None,) * 7


neural_memory_chunked.register_autograd(_backward, setup_context=_save)
