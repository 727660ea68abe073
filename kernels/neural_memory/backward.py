"""The backward of the chunked neural memory: gradients of gradients, in closed form.

Names: h, z, g, delta as in `segment.surprise`; w the steps theta after clip and threshold; d_ before a name is the
gradient of the outer loss. Tensors are [n G, C, d] for a segment of n chunks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memzoo.kernels.neural_memory.activation import Activation
from memzoo.kernels.neural_memory.coefficients import Coefficients, coefficients_backward, flush_
from memzoo.kernels.neural_memory.segment import advance, clip_scale, rows, scaled_rows, squared_norm, steps


class Options(NamedTuple):
    clip: float | None
    threshold: float | None
    act: Activation
    own_write: bool


class _Surprise(NamedTuple):
    """The network at a segment's keys, one tensor per layer, and the updates it made."""

    h: list[Tensor]
    delta: list[Tensor]
    slope: list[Tensor]  # act'(z) of the hidden layers
    bend: list[Tensor]  # g act''(z): how delta depends on z
    scaled: Tensor  # [n G, C, 2] factors of the steps at the chunk's end, times w
    updates: list[Tensor]  # [n G, C, 2 out] scaled delta


class _Grads(NamedTuple):
    """Gradients of a segment, added to in place. From the reads first, then chunk by chunk."""

    h: list[Tensor]
    delta: list[Tensor]
    states: list[Tensor]  # [n G, 2 out, in] of the state at each chunk's start
    scaled: Tensor  # [n G, C, 2]
    mix: Tensor  # [n G, 2, 2]


def sequence_backward(
    d_y: Tensor,
    d_state: list[Tensor],
    inputs: tuple[Tensor, ...],
    start: list[Tensor],
    saved: list[Tensor],
    pieces: list[tuple[int, int]],
    options: Options,
    at_start: Callable[[int, list[Tensor]], list[Tensor]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of q, k, v, gates and theta, of the first state, and of `start`."""
    q, k, theta, mask = inputs
    clip, threshold, act, own_write = options
    L, G = len(start), start[0].shape[0]
    kept, z, g, reads = saved[:L], saved[L : 2 * L - 1], saved[2 * L - 1 : 3 * L - 2], saved[3 * L - 2 : -3]
    err, D, P = saved[-3:]
    c = Coefficients(D, P, mask[..., None])
    mix, end, (read_start, inside) = c.mix(), c.end(), c.read(own_write)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(d_y)
    d_w, d_end, d_mix = torch.empty_like(theta), torch.empty_like(end), torch.zeros_like(mix)
    d_A, d_P = torch.empty_like(P), torch.empty_like(P)
    d_first: list[Tensor] = []
    for i, (c0, c1) in reversed(list(enumerate(pieces))):
        s = slice(c0 * G, c1 * G)
        h, slope, bend = [k[s]], [], []
        for g_l, z_l in zip(g, z):
            value, first, second = act.derivatives(z_l[s])
            h.append(value)
            slope.append(first)
            bend.append(second.mul_(g_l[s]))
        delta = [*(g_l[s] * x for g_l, x in zip(g, slope)), err[s]]
        w = steps(theta[s], h, delta, clip, threshold)
        scaled = end[s] * w[..., None]
        network = _Surprise(h, delta, slope, bend, scaled, [scaled_rows(x, scaled) for x in delta])
        states = _replay([x[i] for x in kept], network, mix[s])

        factors = (read_start[s], inside[s] * w[:, None])
        outputs = [x[s] for x in reads]
        d_q[s], d_h, d_delta, d_states, d_start, d_iw = _read_backward(
            d_y[s], q[s], network, states, outputs, factors, act
        )
        d_A[s, :, 0], d_P[s, :, 0] = d_start.unbind(-1)
        grads = _Grads(d_h, d_delta, d_states, torch.empty_like(scaled), d_mix[s])
        for j in reversed(range(c1 - c0)):
            at = slice(j * G, (j + 1) * G)
            weights = [x[at, : d.shape[1]] for x, d in zip(states, start)] if c0 + j else start
            part = [[x[at] for x in xs] for xs in (states, *network[:4], network.updates, *grads[:3])]
            if c0 + j == 0:
                d_first = d_weights = [torch.zeros_like(x) for x in start]
            else:
                d_weights = [x[:, : d.shape[1]] for x, d in zip(part[-1], start)]
            d_scaled = _update_backward(d_state, mix[s][at], scaled[at], part, grads.mix[at])
            grads.scaled[at] = d_scaled
            if clip is not None:
                _clip_backward(d_scaled, end[s][at], d_iw[at], inside[s][at], theta[s][at], part, threshold, clip)
            _surprise_backward(weights, d_weights, part)
            d_state = at_start(c0 + j, part[-1])
        torch.neg(grads.delta[-1], out=d_v[s])
        d_k[s] = grads.h[0]
        d_w[s] = (grads.scaled * end[s]).sum(-1) + (d_iw * inside[s]).sum(-2)
        torch.mul(grads.scaled, w[..., None], out=d_end[s])
        d_P[s, :, 1:] = d_iw * w[:, None]
        if threshold is not None:
            d_w[s] *= delta[-1].square().sum(-1) >= threshold
        if clip is not None:
            d_w[s] *= clip_scale(squared_norm(h, delta), clip)
        for x in d_state:
            flush_(x)
    d_gates = coefficients_backward(c, d_mix, d_end, d_A, d_P, own_write)
    return [d_q, d_k, d_v, d_gates, d_w], d_state, d_first


def _replay(state: list[Tensor], network: _Surprise, mix: Tensor) -> list[Tensor]:
    """The states [n G, 2 out, in] at the start of each of the segment's chunks."""
    G = state[0].shape[0]
    n = mix.shape[0] // G
    if n == 1:
        return state
    states = [x.new_empty(n * G, *x.shape[1:]) for x in state]
    for history, first, updates, h in zip(states, state, network.updates, network.h):
        history[:G] = first
        for j in range(0, (n - 1) * G, G):
            at = slice(j, j + G)
            advance(history[at], mix[at], updates[at], h[at], out=history[j + G : j + 2 * G])
    return states


def _read_backward(d_y, q, network, states, reads, factors, act: Activation):
    """Gradients of q, h, delta, the states, and the factors of `segment.read`."""
    start, inside = factors
    L = len(states)
    d_start, d_inside = torch.zeros_like(start), torch.zeros_like(inside)
    d_h, d_delta, d_states = [None] * L, [None] * L, [None] * L
    d_r = d_y
    for l in reversed(range(L)):
        h, delta, out = network.h[l], network.delta[l], d_r.shape[-1]
        x, slope, _ = act.derivatives(reads[l - 1]) if l else (q, None, None)
        d_states[l] = torch.bmm(scaled_rows(d_r, start).mT, x)
        W, S = torch.bmm(d_r, states[l][:, :out]), torch.bmm(d_r, states[l][:, out:])  # [n G, C, in]
        d_start[..., 0] += (W * x).sum(-1)
        d_start[..., 1] += (S * x).sum(-1)
        attention, d_attention = torch.bmm(x, h.mT), torch.bmm(d_r, delta.mT).neg_()
        d_inside.addcmul_(attention, d_attention)
        d_delta[l] = torch.bmm(attention.mul_(inside).mT, d_r).neg_()
        d_attention.mul_(inside)
        d_h[l] = torch.bmm(d_attention.mT, x)
        d_r = W.mul_(start[..., :1]).addcmul_(S, start[..., 1:]).baddbmm_(d_attention, h)
        if l:
            d_r.mul_(slope)
    return d_r, d_h, d_delta, d_states, d_start, d_inside


def _update_backward(d_state, mix, scaled, part, d_mix) -> Tensor:
    """state after = mix state - (scaled delta)' h; returns the gradient of scaled [G, C, 2]."""
    states, h, delta, _, _, updates, d_h, d_delta, d_states = part
    d_scaled = torch.zeros_like(scaled)
    for l, d in enumerate(d_state):
        both = torch.bmm(h[l], d.mT).view(*h[l].shape[:2], 2, -1)  # [G, C, 2, out]
        d_scaled.sub_((both * delta[l].unsqueeze(2)).sum(-1))
        for part_of in (0, 1):
            d_delta[l].addcmul_(both[:, :, part_of], scaled[..., part_of, None], value=-1)
        d_h[l].baddbmm_(updates[l], d, alpha=-1)
        d_mix.baddbmm_(rows(d), rows(states[l]).mT)
        rows(d_states[l]).baddbmm_(mix.mT, rows(d))
    return d_scaled


def _surprise_backward(weights, d_weights, part) -> None:
    _, h, delta, slope, bend, _, d_h, d_delta, _ = part
    last = len(weights) - 1
    d_z = []
    for l in range(last):  # delta_l = (delta_{l+1} W_{l+1}) * act'(z_l)
        d_z.append(d_delta[l] * bend[l])
        d_g = d_delta[l] * slope[l]
        d_delta[l + 1].baddbmm_(d_g, weights[l + 1].mT)
        d_weights[l + 1].baddbmm_(delta[l + 1].mT, d_g)
    d_out = d_delta[last]
    for l in reversed(range(last + 1)):  # z_l = h_{l-1} W_l'
        d_weights[l].baddbmm_(d_out.mT, h[l])
        d_h[l].baddbmm_(d_out, weights[l])
        if l:
            d_out = d_z[l - 1].addcmul_(d_h[l], slope[l - 1])


def _clip_backward(d_scaled, end, d_iw, inside, theta, part, threshold, clip) -> None:
    """Adds to the gradients of h and delta, on which the scale min(1, clip / ||g||) of theta depends."""
    _, h, delta, _, _, _, d_h, d_delta, _ = part
    square = squared_norm(h, delta)
    d_w = (d_scaled * end).sum(-1) + (d_iw * inside).sum(-2)
    if threshold is not None:
        d_w *= delta[-1].square().sum(-1) >= threshold
    # d scale / d square = -scale / (2 square) where it clips; the 2 goes against those of the squares
    d_square = torch.where(square > clip**2, -(d_w * theta) * clip_scale(square, clip) / square, 0.0)
    for x, d, d_x, d_d in zip(h, delta, d_h, d_delta):
        d_x.addcmul_(x, (d_square * (d * d).sum(-1))[..., None])
        d_d.addcmul_(d, (d_square * (x * x).sum(-1))[..., None])
