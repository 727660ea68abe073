"""Gated slots by chunks of matrix products, with a hand-written backward that recomputes.

Slots are flattened to N = K S. With q_t = router alpha, k_t = w, a_t = decay (1 - MAX_ERASE w erase) what each slot
keeps, and P_t = a_1 ... a_t from the chunk's start, a chunk of C tokens that starts from M is

    Q = q_t P_{t-1},  K = k_t / P_t                 # [C, N]; K stays finite because C and a are bounded
    y = Q M + tril(Q K', -1) v
    M' = P_C M + (K P_C)' v

No factor of a token depends on a later one, so causality is exact to the last bit.

Time is walked in segments of a few chunks that fit the cache. Forward keeps only the state at each segment's start;
backward recomputes a segment, then walks its chunks. Memory is O(T (N + m)) for inputs and O(T / SEGMENT N m) for
states.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from memzoo.kernels.gated_slots.reference import MAX_ERASE

CHUNK = 16  # (MIN_DECAY (1 - MAX_ERASE))^CHUNK must stay above the smallest normal float32, 1.2e-38
SEGMENT = 128


class _Segment(NamedTuple):
    """What a segment computes before it needs the state. n chunks of C tokens, N = K S slots."""

    alpha: Tensor  # [B, n, C, K, S] read address
    omega: Tensor  # [B, n, C, K, S] write address
    write: Tensor  # [B, n, C, K] router * gate * mask
    mask: Tensor  # [B, n, C, 1]
    router: Tensor  # [B, n, C, K]
    gate: Tensor  # [B, n, C]
    erase: Tensor  # [B, n, C]
    w: Tensor  # [B, n, C, N] write weights
    keep: Tensor  # [B, n, C, N] 1 - MAX_ERASE w erase
    up: Tensor  # [B, n, C, N] P_{t-1}
    down: Tensor  # [B, n, C, N] 1 / P_t
    Q: Tensor  # [B, n, C, N]
    K: Tensor  # [B, n, C, N]
    A: Tensor  # [B, n, C, C] tril(Q K', -1)
    end: Tensor  # [B, n, 1, N] P_C
    value: Tensor  # [B, n, C, m]


def _pieces(T: int) -> list[tuple[int, int]]:
    return [(t, min(t + SEGMENT, T)) for t in range(0, T, SEGMENT)]


def _to_chunks(x: Tensor, n: int, C: int) -> Tensor:
    """[B, L, ...] -> [B, n, C, ...], zeros after the end."""
    if pad := n * C - x.shape[1]:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], 1)
    return x.reshape(x.shape[0], n, C, *x.shape[2:])


def _prepare(inputs: list[Tensor], decay: float, mask: Tensor) -> _Segment:
    L = mask.shape[1]
    C = min(CHUNK, L)
    n = -(-L // C)
    logits, router, gate, erase, value = (_to_chunks(x, n, C) for x in inputs)
    mask = _to_chunks(mask, n, C)[..., None]
    alpha, omega = logits.softmax(-1).unbind(3)
    scale = router * gate[..., None] * mask  # [B, n, C, K]
    w = (scale[..., None] * omega).flatten(-2)
    keep = (w * (-MAX_ERASE * erase[..., None])).add_(1.0)
    a = keep if decay == 1.0 else keep * torch.where(mask > 0, mask.new_tensor(decay), mask.new_ones(()))
    products = torch.ones_like(a[:, :, :1]).expand(-1, -1, C + 1, -1).contiguous()  # [B, n, C + 1, N], P_0 = 1
    for t in range(C):
        torch.mul(products[:, :, t], a[:, :, t], out=products[:, :, t + 1])
    up, down, end = products[:, :, :-1], products[:, :, 1:].reciprocal(), products[:, :, -1:]
    Q = (router[..., None] * alpha).flatten(-2).mul_(up)
    K = w * down
    A = (Q @ K.mT).tril(-1)
    return _Segment(alpha, omega, scale, mask, router, gate, erase, w, keep, up, down, Q, K, A, end, value)


def _states(s: _Segment, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start [B, n, N, m], and after the last chunk [B, N, m]."""
    update = (s.K * s.end).mT @ s.value  # [B, n, N, m]
    return _chain(update, s.end.mT, state, range(update.shape[1]))


def _chain(update: Tensor, through: Tensor, state: Tensor, order: range) -> tuple[Tensor, Tensor]:
    """state' = update_i + through_i state, chunk after chunk; what each chunk began with, and the last."""
    begins = torch.empty_like(update)
    begins[:, order[0]] = state
    for i, j in pairwise(order):
        torch.addcmul(update[:, i], through[:, i], begins[:, i], out=begins[:, j])
    i = order[-1]
    return begins, torch.addcmul(update[:, i], through[:, i], begins[:, i])


@torch.library.custom_op("memzoo::gated_slots", mutates_args=())
def _forward(
    logits: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    initial_state: Tensor,
    decay: float,
    mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [B, T, m], the final state [B, K, S, m] and the states at the segments' starts [B, segments, N, m]."""
    B, T, m = value.shape
    tensors = [logits, router, write_gate, erase, value]
    state, y, saved = initial_state.flatten(1, 2), torch.empty_like(value), []
    for a, b in _pieces(T):
        saved.append(state)
        s = _prepare([x[:, a:b] for x in tensors], decay, mask[:, a:b])
        starts, state = _states(s, state)
        out = s.A @ s.value + s.Q @ starts
        y[:, a:b] = out.reshape(B, -1, m)[:, : b - a]
    return y, state.view_as(initial_state).clone(), torch.stack(saved, 1)


@_forward.register_fake
def _(logits, router, write_gate, erase, value, initial_state, decay, mask):
    B, K, S, m = initial_state.shape
    segments = -(-value.shape[1] // SEGMENT)
    return torch.empty_like(value), torch.empty_like(initial_state), value.new_empty(B, segments, K * S, m)


@torch.library.custom_op("memzoo::gated_slots_backward", mutates_args=())
def _backward_op(
    grad_y: Tensor,
    grad_state: Tensor,
    logits: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    saved: Tensor,
    decay: float,
    mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T = value.shape[1]
    tensors = [logits, router, write_gate, erase, value]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    d_state = grad_state.flatten(1, 2)  # [B, N, m]
    for i, (a, b) in reversed(list(enumerate(_pieces(T)))):
        inputs = [x[:, a:b] for x in tensors]
        d_pieces, d_state = _segment_backward(inputs, mask[:, a:b], decay, saved[:, i], grad_y[:, a:b], d_state)
        for grad, d in zip(grads, d_pieces):
            grad[:, a:b] = d.flatten(1, 2)[:, : b - a]
    d_logits, d_router, d_gate, d_erase, d_value = grads
    return d_logits, d_router, d_gate, d_erase, d_value, d_state.reshape(grad_state.shape).clone()


@_backward_op.register_fake
def _(grad_y, grad_state, logits, router, write_gate, erase, value, saved, decay, mask):
    tensors = (logits, router, write_gate, erase, value, grad_state)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _segment_backward(
    inputs: list[Tensor], mask: Tensor, decay: float, state: Tensor, grad_y: Tensor, d_state: Tensor
) -> tuple[list[Tensor], Tensor]:
    s = _prepare(inputs, decay, mask)
    n, C = s.Q.shape[1:3]
    banks = s.alpha.shape[-2:]
    M, last = _states(s, state)
    dy = _to_chunks(grad_y, n, C)
    total = (d_state * last).sum(-1)  # [B, N], gradient of log(a_1 ... a_L) from what follows the segment
    # Q' dy is how y depends on each chunk's start; d_end [B, n, N, m] is the gradient of the state after each chunk
    d_end, d_state = _chain(s.Q.mT @ dy, s.end.mT, d_state, range(n - 1, -1, -1))

    dA = (dy @ s.value.mT).tril_(-1)
    d_value = s.A.mT @ dy + (s.K * s.end) @ d_end
    dQ = (dA @ s.K).add_(dy @ M.mT)
    dK = (dA.mT @ s.Q).add_((s.value @ d_end.mT).mul_(s.end))
    # gradient of log a_t: q_i has a_1 ... a_{i-1} and k_i the inverses of a_1 ... a_i, so it is the sum of q dq over
    # i > t, minus that of k dk over i >= t, plus what follows
    q_part, d_g = s.Q * dQ, torch.mul(s.K, dK).neg_()
    for t in range(C - 1, 0, -1):
        d_g[:, :, t - 1] += d_g[:, :, t]
        d_g[:, :, t - 1] += q_part[:, :, t]
    whole = d_g[:, :, 0] + q_part[:, :, 0]  # [B, n, N], of each chunk
    for i in range(n - 1, -1, -1):
        d_g[:, i] += total[:, None]
        total = total + whole[:, i]
    dq, dk = dQ.mul_(s.up).unflatten(-1, banks), dK.mul_(s.down)

    d_keep = d_g.div_(s.keep).mul_(-MAX_ERASE)
    d_erase = (d_keep * s.w).sum(-1)
    dw = dk.addcmul_(d_keep, s.erase[..., None]).unflatten(-1, banks)
    d_logits = torch.empty(*dq.shape[:3], 2, *banks, dtype=dq.dtype, device=dq.device)
    d_router = _softmax_backward(s.alpha, dq, s.router, d_logits[:, :, :, 0])
    d_scale = _softmax_backward(s.omega, dw, s.write, d_logits[:, :, :, 1])
    d_scale = d_scale * s.mask
    d_gate = (d_scale * s.router).sum(-1)
    d_router = torch.addcmul(d_router, d_scale, s.gate[..., None])
    return [d_logits, d_router, d_gate, d_erase, d_value], d_state


def _softmax_backward(p: Tensor, grad: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """For scale * p with p = softmax(logits): the gradient of the logits into `out`; returns that of the scale."""
    d_scale = (grad * p).sum(-1)
    torch.mul(grad.sub_(d_scale[..., None]).mul_(scale[..., None]), p, out=out)
    return d_scale


def _save(ctx, inputs, output) -> None:
    *tensors, _, decay, mask = inputs
    ctx.save_for_backward(*tensors, output[2], mask)
    ctx.decay = decay


def _backward(ctx, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved, mask = ctx.saved_tensors
    grads = _backward_op(grad_y, grad_state, *tensors, saved, ctx.decay, mask)
    return *grads, None, None


_forward.register_autograd(_backward, setup_context=_save)


def gated_slots_chunked(
    logits: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    initial_state: Tensor,
    decay: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the public op, for float32 and float64."""
    if mask is None:
        mask = value.new_ones(value.shape[:2])
    tensors = (logits, router, write_gate, erase, value, initial_state)
    y, state, _ = _forward(*tensors, decay, mask)
    return y, state
