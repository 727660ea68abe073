"""Selective scan with torch operators only: the default wherever neither Numba nor Triton applies.

Mamba (arXiv 2312.00752), equation 2 and section 3.3.2. Time runs in chunks of `CHUNK` steps whose decays and states
sit in two reused buffers [t, B, I, N]; a step is one addcmul, the output of a chunk one matmul. Backward keeps only
the states at chunk starts, recomputes a chunk and walks it in reverse:

    g_t = C_t dL/dy_t + exp(delta_{t+1} A) * g_{t+1}                     dL/dh_t, [B, I, N]
    dL/dA = sum_t delta_t q_t, dL/d delta_t = sum_n A q_t + u_t B_t . g_t,  q_t = exp(delta_t A) * g_t * h_{t-1}
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.selective_scan.common import CHUNK, ScanGradients, ScanInputs, softplus


class _TimeMajor:
    """The inputs of a scan by chunks of time: u, delta (after bias, softplus and mask), z [t, B, I]; B, C [t, B, N].

    A pad gets delta = 0, so that the state passes unchanged, and zeros elsewhere, so that no NaN in it can spread.
    """

    def __init__(self, inputs: ScanInputs):
        self.inputs = inputs
        self.pad = None if inputs.mask is None else ~inputs.mask.t().unsqueeze(-1)  # [T, B, 1]
        self.time = inputs.u.shape[2]

    def cut(self, x: Tensor, start: int) -> Tensor:
        """Steps start to start + CHUNK of x [B, I or N, T], pads zeroed."""
        x = x[:, :, start : start + CHUNK].permute(2, 0, 1)
        return x if self.pad is None else x.masked_fill(self.pad[start : start + CHUNK], 0.0)

    def raw_delta(self, start: int) -> Tensor:
        delta = self.cut(self.inputs.delta, start)
        return delta if self.inputs.delta_bias is None else delta + self.inputs.delta_bias

    def delta(self, start: int) -> Tensor:
        delta = self.raw_delta(start)
        if self.inputs.delta_softplus:
            delta = softplus(delta)
        return delta if self.pad is None else delta.masked_fill(self.pad[start : start + CHUNK], 0.0)

    def buffer(self) -> Tensor:
        batch, channels, _ = self.inputs.u.shape
        return self.inputs.u.new_empty(min(CHUNK, self.time), batch, channels, self.inputs.A.shape[1])


def _states(A: Tensor, delta: Tensor, x: Tensor, B: Tensor, h: Tensor, decay: Tensor, out: Tensor):
    """Fill the buffers, decay = exp(delta A) and out = state after each step; returns both, cut to the chunk."""
    steps = delta.shape[0]
    decay = torch.mul(delta.unsqueeze(-1), A, out=decay[:steps]).exp_()
    out = torch.mul(x.unsqueeze(-1), B.unsqueeze(2), out=out[:steps])
    for decay_t, out_t in zip(decay.unbind(0), out.unbind(0)):
        h = out_t.addcmul_(decay_t, h)
    return decay, out


def _read(states: Tensor, C: Tensor, u: Tensor, D: Tensor | None) -> Tensor:
    """C_t . h_t + D u_t for a chunk, [t, B, I]."""
    y = torch.matmul(states, C.unsqueeze(-1)).squeeze(-1)
    return y if D is None else y.addcmul_(u, D)


def forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [B, I, T], final state [B, I, N], the states at the K chunk starts [B, K, I N] (none if not save)."""
    batch, channels, time = inputs.u.shape
    states = inputs.A.shape[1]
    scan = _TimeMajor(inputs)
    decay, out = scan.buffer(), scan.buffer()
    h = inputs.u.new_zeros(batch, channels, states) if inputs.initial_state is None else inputs.initial_state
    y = inputs.u.new_empty(batch, time, channels)
    starts = inputs.u.new_empty(batch, -(-time // CHUNK) if save else 0, channels * states)
    for start in range(0, time, CHUNK):
        if save:
            starts[:, start // CHUNK] = h.flatten(1)
        u, delta = scan.cut(inputs.u, start), scan.delta(start)
        _, h_t = _states(inputs.A, delta, delta * u, scan.cut(inputs.B, start), h, decay, out)
        y_t = _read(h_t, scan.cut(inputs.C, start), u, inputs.D)
        if inputs.z is not None:
            y_t = y_t.mul_(F.silu(scan.cut(inputs.z, start)))
        y[:, start : start + CHUNK] = y_t.transpose(0, 1)
        h = h_t[-1].clone()
    return y.transpose(1, 2), h, starts


def backward(inputs: ScanInputs, starts: Tensor, grad_y: Tensor, grad_final: Tensor | None) -> ScanGradients:
    A, D, z = inputs.A, inputs.D, inputs.z
    batch, channels, time = inputs.u.shape
    starts = starts.unflatten(2, A.shape)
    scan = _TimeMajor(inputs)
    decay, after, grad_h = scan.buffer(), scan.buffer(), scan.buffer()

    def empty(size: int) -> Tensor:
        return A.new_empty(batch, time, size)

    grad_u, grad_delta, grad_B, grad_C = empty(channels), empty(channels), empty(A.shape[1]), empty(A.shape[1])
    grad_z = None if z is None else empty(channels)
    grad_A, grad_D, grad_bias = torch.zeros_like(A), A.new_zeros(channels), A.new_zeros(channels)
    carry = torch.zeros_like(starts[:, 0]) if grad_final is None else grad_final
    for start in reversed(range(0, time, CHUNK)):
        now = slice(start, start + CHUNK)
        u, delta, B, C, gy = (
            scan.cut(inputs.u, start), scan.delta(start), scan.cut(inputs.B, start), scan.cut(inputs.C, start),
            scan.cut(grad_y, start),
        )  # fmt: skip
        x = delta * u
        decay_t, h_t = _states(A, delta, x, B, starts[:, start // CHUNK], decay, after)
        if z is not None:
            gate = scan.cut(z, start)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            grad_z[:, now] = (gy * _read(h_t, C, u, D) * (sigmoid + silu * (1 - sigmoid))).transpose(0, 1)
            gy = gy * silu
        grad_C[:, now] = torch.matmul(gy.unsqueeze(2), h_t).squeeze(2).transpose(0, 1)

        g = torch.mul(gy.unsqueeze(-1), C.unsqueeze(2), out=grad_h[: delta.shape[0]])
        for g_t, a_t in zip(reversed(g.unbind(0)), reversed(decay_t.unbind(0))):
            carry = g_t.add_(carry) * a_t
        grad_x = torch.matmul(g, B.unsqueeze(-1)).squeeze(-1)  # [t, B, I]
        grad_B[:, now] = torch.matmul(x.unsqueeze(2), g).squeeze(2).transpose(0, 1)
        q = g.mul_(decay_t)
        q[1:] *= h_t[:-1]
        q[0] *= starts[:, start // CHUNK]
        gd = torch.addcmul((q * A).sum(-1), grad_x, u)
        grad_A += q.mul_(delta.unsqueeze(-1)).sum((0, 1))
        gu = grad_x * delta
        if D is not None:
            gu.addcmul_(gy, D)
            grad_D += (gy * u).sum((0, 1))
        if inputs.delta_softplus:
            gd.mul_(torch.sigmoid(scan.raw_delta(start)))
        if scan.pad is not None:
            gd.masked_fill_(scan.pad[now], 0.0)
        grad_bias += gd.sum((0, 1))
        grad_u[:, now], grad_delta[:, now] = gu.transpose(0, 1), gd.transpose(0, 1)
    return ScanGradients(
        u=grad_u.transpose(1, 2),
        delta=grad_delta.transpose(1, 2),
        A=grad_A,
        B=grad_B.transpose(1, 2),
        C=grad_C.transpose(1, 2),
        D=None if D is None else grad_D,
        z=None if z is None else grad_z.transpose(1, 2),
        delta_bias=None if inputs.delta_bias is None else grad_bias,
        initial_state=None if inputs.initial_state is None else carry,
    )
