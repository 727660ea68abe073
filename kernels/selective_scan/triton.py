"""Selective scan on a GPU in Triton, forward and backward; imported only when it runs.

Mamba (arXiv 2312.00752), section 3.3.2 and algorithm 2. A program owns one row of the batch and `BLOCK_I` channels and
walks time in chunks of `CHUNK` steps held in registers as [t, i, n]. Inside a chunk the recurrence is an associative
scan over (decay, input), (a1, x1) . (a2, x2) = (a1 a2, a2 x1 + x2), to which the carried state is added. Backward
recomputes a chunk from its saved start and scans it in reverse:

    g_t = C_t dL/dy_t + exp(delta_{t+1} A) * g_{t+1}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memzoo.kernels.selective_scan.common import CHUNK, ScanGradients, ScanInputs

BLOCK_I = 8  # with 16 steps, 16 states and 4 warps the backward takes 225 registers and spills none


@triton.jit
def _combine(a1, x1, a2, x2):
    return a1 * a2, a2 * x1 + x2


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))  # exact for a small e, too
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _real(mask, b, t, T, HAS_MASK: tl.constexpr):
    """[t]: inside the sequence and not a pad."""
    inside = (t >= 0) & (t < T)
    if HAS_MASK:
        inside = inside & (tl.load(mask + b * T + t, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _tile(sequence, stride_b, stride_t, b, t, i, allowed):
    """[t, i or n] of a sequence with contiguous channels, zeros where not allowed."""
    return tl.load(sequence + b * stride_b + t[:, None] * stride_t + i[None, :], mask=allowed, other=0.0)


@triton.jit
def _raw_delta(delta, stride_b, stride_t, bias, b, t, i, I, allowed, HAS_BIAS: tl.constexpr):
    raw = _tile(delta, stride_b, stride_t, b, t, i, allowed)
    if HAS_BIAS:
        raw += tl.load(bias + i, mask=i < I, other=0.0)[None, :]
    return raw


@triton.jit
def _positive(raw, allowed, SOFTPLUS: tl.constexpr):
    """delta_t, zero at pads so that they keep the state."""
    if SOFTPLUS:
        raw = _softplus(raw)
    return tl.where(allowed, raw, 0.0)


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, bias, initial, mask, y, final, starts,
    u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t, T, I, N, chunks,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_MASK: tl.constexpr, SAVE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [B, T, I]; initial, final [B, I, N]; starts [B, K, I, N]; grid (B, blocks of channels)."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    row = tl.arange(0, CHUNK)
    in_state = (i < I)[:, None] & (n < N)[None, :]
    state_at = i[:, None] * N + n[None, :]
    a = tl.load(A + state_at, mask=in_state, other=0.0)
    h = tl.zeros_like(a)
    if HAS_INITIAL:
        h = tl.load(initial + b * I * N + state_at, mask=in_state, other=0.0)
    for chunk in range(chunks):
        t = (chunk * CHUNK + row).to(tl.int64)
        real = _real(mask, b, t, T, HAS_MASK)
        channels = real[:, None] & (i < I)[None, :]
        states = real[:, None] & (n < N)[None, :]
        if SAVE:
            tl.store(starts + (b * chunks + chunk) * I * N + state_at, h, mask=in_state)
        dt = _positive(_raw_delta(delta, delta_b, delta_t, bias, b, t, i, I, channels, HAS_BIAS), channels, SOFTPLUS)
        u_tile = _tile(u, u_b, u_t, b, t, i, channels)
        B_tile = _tile(B, B_b, B_t, b, t, n, states)
        C_tile = _tile(C, C_b, C_t, b, t, n, states)
        decay = tl.exp(dt[:, :, None] * a[None, :, :])
        product, inner = tl.associative_scan((decay, (dt * u_tile)[:, :, None] * B_tile[:, None, :]), 0, _combine)
        h_tile = inner + product * h[None, :, :]
        out = tl.sum(h_tile * C_tile[:, None, :], axis=2)
        if HAS_D:
            out += u_tile * tl.load(D + i, mask=i < I, other=0.0)[None, :]
        if HAS_Z:
            gate = _tile(z, z_b, z_t, b, t, i, channels)
            out *= gate * _sigmoid(gate)
        inside = (t < T)[:, None] & (i < I)[None, :]
        tl.store(y + (b * T + t[:, None]) * I + i[None, :], tl.where(channels, out, 0.0), mask=inside)
        h = tl.sum(tl.where((row == CHUNK - 1)[:, None, None], h_tile, 0.0), axis=0)
    tl.store(final + b * I * N + state_at, h, mask=in_state)


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, z, bias, mask, starts, grad_y, grad_final,
    grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial,
    u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t, gy_b, gy_t, T, I, N, chunks,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_FINAL: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_u, grad_delta, grad_z [B, T, I]; grad_B, grad_C [B, T, N] start at zero and are summed over the blocks of
    channels with atomics; grad_A [B, I, N], grad_D, grad_bias [B, I] are summed over the batch by the caller."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    row = tl.arange(0, CHUNK)
    in_state = (i < I)[:, None] & (n < N)[None, :]
    state_at = i[:, None] * N + n[None, :]
    a = tl.load(A + state_at, mask=in_state, other=0.0)
    carry = tl.zeros_like(a)  # dL/dh at the end of the chunk, from later chunks
    if HAS_FINAL:
        carry = tl.load(grad_final + b * I * N + state_at, mask=in_state, other=0.0)
    skip = tl.zeros([BLOCK_I], a.dtype)
    if HAS_D:
        skip = tl.load(D + i, mask=i < I, other=0.0)
    sum_A, sum_D, sum_bias = tl.zeros_like(a), tl.zeros_like(skip), tl.zeros_like(skip)
    for step in range(chunks):
        chunk = chunks - 1 - step
        t = (chunk * CHUNK + row).to(tl.int64)
        real = _real(mask, b, t, T, HAS_MASK)
        channels = real[:, None] & (i < I)[None, :]
        states = real[:, None] & (n < N)[None, :]
        raw = _raw_delta(delta, delta_b, delta_t, bias, b, t, i, I, channels, HAS_BIAS)
        dt = _positive(raw, channels, SOFTPLUS)
        u_tile = _tile(u, u_b, u_t, b, t, i, channels)
        gy = _tile(grad_y, gy_b, gy_t, b, t, i, channels)
        B_tile = _tile(B, B_b, B_t, b, t, n, states)
        C_tile = _tile(C, C_b, C_t, b, t, n, states)
        h_start = tl.load(starts + (b * chunks + chunk) * I * N + state_at, mask=in_state, other=0.0)

        # states before each step: the scan of the previous steps, nothing before the first
        before = _real(mask, b, t - 1, T, HAS_MASK) & (row > 0)
        allowed = before[:, None] & (i < I)[None, :]
        dt_1 = _positive(
            _raw_delta(delta, delta_b, delta_t, bias, b, t - 1, i, I, allowed, HAS_BIAS), allowed, SOFTPLUS
        )
        x_1 = dt_1 * _tile(u, u_b, u_t, b, t - 1, i, allowed)
        B_1 = _tile(B, B_b, B_t, b, t - 1, n, before[:, None] & (n < N)[None, :])
        product, inner = tl.associative_scan(
            (tl.exp(dt_1[:, :, None] * a[None, :, :]), x_1[:, :, None] * B_1[:, None, :]), 0, _combine
        )
        h_before = inner + product * h_start[None, :, :]
        decay = tl.exp(dt[:, :, None] * a[None, :, :])
        x = dt * u_tile
        h_tile = decay * h_before + x[:, :, None] * B_tile[:, None, :]

        inside = (t < T)[:, None] & (i < I)[None, :]
        at = (b * T + t[:, None]) * I + i[None, :]
        if HAS_Z:
            out = tl.sum(h_tile * C_tile[:, None, :], axis=2) + u_tile * skip[None, :]
            gate = _tile(z, z_b, z_t, b, t, i, channels)
            p = _sigmoid(gate)
            tl.store(grad_z + at, gy * out * (p + gate * (p - p * p)), mask=inside)
            gy = gy * gate * p

        # g_t: the same scan in reverse, with the decay of the next step; the last one meets the carry undecayed
        after = _real(mask, b, t + 1, T, HAS_MASK) & (row < CHUNK - 1)
        allowed = after[:, None] & (i < I)[None, :]
        dt_2 = _positive(
            _raw_delta(delta, delta_b, delta_t, bias, b, t + 1, i, I, allowed, HAS_BIAS), allowed, SOFTPLUS
        )
        product, inner = tl.associative_scan(
            (tl.exp(dt_2[:, :, None] * a[None, :, :]), gy[:, :, None] * C_tile[:, None, :]), 0, _combine, reverse=True
        )
        g = inner + product * carry[None, :, :]
        q = g * decay  # dL/dh_{t-1}
        carry = tl.sum(tl.where((row == 0)[:, None, None], q, 0.0), axis=0)
        q *= h_before  # dL/d(delta_t A)

        gx = tl.sum(g * B_tile[:, None, :], axis=2)
        gd = tl.sum(q * a[None, :, :], axis=2) + gx * u_tile
        if SOFTPLUS:
            gd *= _sigmoid(raw)
        gd = tl.where(channels, gd, 0.0)
        tl.store(grad_u + at, gx * dt + gy * skip[None, :], mask=inside)
        tl.store(grad_delta + at, gd, mask=inside)
        sequence_at = (b * T + t[:, None]) * N + n[None, :]
        tl.atomic_add(grad_B + sequence_at, tl.sum(g * x[:, :, None], axis=1), mask=states)
        tl.atomic_add(grad_C + sequence_at, tl.sum(h_tile * gy[:, :, None], axis=1), mask=states)
        sum_A += tl.sum(q * dt[:, :, None], axis=0)
        sum_D += tl.sum(gy * u_tile, axis=0)
        sum_bias += tl.sum(gd, axis=0)
    tl.store(grad_initial + b * I * N + state_at, carry, mask=in_state)
    tl.store(grad_A + b * I * N + state_at, sum_A, mask=in_state)
    tl.store(grad_D + b * I + i, sum_D, mask=i < I)
    tl.store(grad_bias + b * I + i, sum_bias, mask=i < I)


def _sequence(x: Tensor) -> Tensor:
    """[B, I, T] as [B, T, I] with contiguous channels."""
    x = x.transpose(1, 2)
    return x if x.stride(2) == 1 else x.contiguous()


def _prepare(inputs: ScanInputs, *more: Tensor) -> tuple[list[Tensor], list[int], dict[str, bool | int]]:
    """Sequences (u, delta, B, C, z, *more), their strides over batch and time, compile-time options of both kernels.

    An absent z is stood in for by u: the kernel never reads it."""
    z = inputs.u if inputs.z is None else inputs.z
    sequences = [_sequence(x) for x in (inputs.u, inputs.delta, inputs.B, inputs.C, z, *more)]
    strides = [stride for x in sequences for stride in x.stride()[:2]]
    options = {
        "SOFTPLUS": inputs.delta_softplus,
        "HAS_D": inputs.D is not None,
        "HAS_Z": inputs.z is not None,
        "HAS_BIAS": inputs.delta_bias is not None,
        "HAS_MASK": inputs.mask is not None,
        "CHUNK": CHUNK,
        "BLOCK_I": BLOCK_I,
        "BLOCK_N": triton.next_power_of_2(inputs.A.shape[1]),
    }
    return sequences, strides, options


def _dense(x: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if x is None else x.contiguous()


def forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [B, I, T], final state [B, I, N], the states at the K chunk starts [B, K, I N] (none if not save)."""
    (u, delta, B, C, z), strides, options = _prepare(inputs)
    batch, time, channels = u.shape
    A = inputs.A.contiguous()
    states, chunks = A.shape[1], triton.cdiv(time, CHUNK)
    y, final = u.new_empty(batch, time, channels), u.new_empty(batch, channels, states)
    starts = u.new_empty(batch, chunks if save else 0, channels * states)
    D, bias, initial = (_dense(x, A) for x in (inputs.D, inputs.delta_bias, inputs.initial_state))
    mask = A if inputs.mask is None else inputs.mask.to(torch.uint8).contiguous()
    forward_kernel[(batch, triton.cdiv(channels, BLOCK_I))](
        u, delta, A, B, C, D, z, bias, initial, mask, y, final, starts, *strides, time, channels, states, chunks,
        HAS_INITIAL=inputs.initial_state is not None, SAVE=save, **options,
    )  # fmt: skip
    return y.transpose(1, 2), final, starts


def backward(inputs: ScanInputs, starts: Tensor, grad_y: Tensor, grad_final: Tensor | None) -> ScanGradients:
    (u, delta, B, C, z, gy), strides, options = _prepare(inputs, grad_y)
    batch, time, channels = u.shape
    A = inputs.A.contiguous()
    states = A.shape[1]
    D, bias, final = (_dense(x, A) for x in (inputs.D, inputs.delta_bias, grad_final))
    mask = A if inputs.mask is None else inputs.mask.to(torch.uint8).contiguous()
    grad_u, grad_delta = u.new_empty(batch, time, channels), u.new_empty(batch, time, channels)
    grad_z = grad_u if inputs.z is None else u.new_empty(batch, time, channels)
    grad_B, grad_C = u.new_zeros(batch, time, states), u.new_zeros(batch, time, states)
    grad_A, grad_initial = u.new_empty(batch, channels, states), u.new_empty(batch, channels, states)
    grad_D, grad_bias = u.new_empty(batch, channels), u.new_empty(batch, channels)
    backward_kernel[(batch, triton.cdiv(channels, BLOCK_I))](
        u, delta, A, B, C, D, z, bias, mask, starts, gy, final,
        grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial,
        *strides, time, channels, states, starts.shape[1], HAS_FINAL=grad_final is not None, **options,
    )  # fmt: skip
    return ScanGradients(
        u=grad_u.transpose(1, 2),
        delta=grad_delta.transpose(1, 2),
        A=grad_A.sum(0),
        B=grad_B.transpose(1, 2),
        C=grad_C.transpose(1, 2),
        D=grad_D.sum(0),
        z=grad_z.transpose(1, 2),
        delta_bias=grad_bias.sum(0),
        initial_state=grad_initial,
    )
