"""One token of the cell in one compiled pass over the state, for decoding on the CPU. Needs numba, no compiler."""

import importlib.util
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from memzoo.kernels.gated_slots.reference import MAX_ERASE

READ_EPS = 1e-4  # on the mean square of what is read; an empty memory reads as zero

_HAS_NUMBA = importlib.util.find_spec("numba") is not None


def is_available(x: Tensor, mask: Tensor | None, tensors: list[Tensor]) -> bool:
    """Whether this is a step for `step`: one real token, on the CPU, in float32 or float64, without gradients."""
    if not _HAS_NUMBA or x.shape[1] != 1 or mask is not None or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.float64):
        return False
    same = all(tensor.dtype == x.dtype for tensor in tensors)
    return same and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def step(
    x: Tensor,
    h0: Tensor,
    M0: Tensor,
    weights: Any,
    router_bias: Tensor,
    top_k: int | None,
    shared_bank: bool,
    decay: float,
    slot_norm_cap: float | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """As the public op with T = 1; the given state is not written to."""
    h, logits = torch.empty_like(h0), x.new_empty(x.shape[0], 1, weights.router_out.shape[0])
    M = torch.empty_like(M0, memory_format=torch.contiguous_format)
    bias = router_bias.to(x.dtype).expand(logits.shape)
    tensors = (x, h0, M0, *weights, bias, h, logits, M)
    options = (top_k or 0, shared_bank, decay, slot_norm_cap or math.inf)
    _kernel()(*(tensor.detach().numpy() for tensor in tensors), *options)
    return h[:, None], logits, (h, M)


@cache
def _kernel():
    import numba
    import numpy as np

    @numba.njit(cache=True, fastmath=True)
    def dot(a, b):
        total = a.dtype.type(0)
        for i in range(a.shape[0]):
            total += a[i] * b[i]
        return total

    @numba.njit(cache=True, fastmath={"contract", "reassoc", "arcp", "nsz"})
    def softmax_(p):
        top = p.max()
        total = p.dtype.type(0)
        for i in range(p.shape[0]):
            p[i] = math.exp(p[i] - top)
            total += p[i]
        for i in range(p.shape[0]):
            p[i] /= total

    @numba.njit(cache=True)
    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    @numba.njit(cache=True)
    def keep_largest(p, k):
        """Zero all but the k largest; ties go to the lower index."""
        for i in range(p.shape[0]):
            larger = 0
            for j in range(p.shape[0]):
                if abs(p[j]) > abs(p[i]) or (abs(p[j]) == abs(p[i]) and j < i):
                    larger += 1
            if larger >= k:
                p[i] = -p[i]  # marked, since the others still compare with it
        for i in range(p.shape[0]):
            if p[i] < 0:
                p[i] = 0

    @numba.njit(cache=True, fastmath={"contract", "reassoc", "arcp", "nsz"})
    def run(x, h0, M0, W_o, b_o, keys, W_c, bias, h, logits, M, top_k, shared, decay, cap):
        B, K, S, m = M0.shape
        R, H = W_o.shape[1], h0.shape[1]
        real = x.dtype.type
        hidden, rho = np.empty(R, x.dtype), np.ones(K, x.dtype)
        query, key, value, c = np.empty(m, x.dtype), np.empty(m, x.dtype), np.empty(m, x.dtype), np.empty(m, x.dtype)
        read, write = np.empty(S, x.dtype), np.empty(S, x.dtype)
        first = 1 if shared else 0
        for b in range(B):
            row = x[b, 0]
            for i in range(R):
                hidden[i] = max(row[i], real(0))
            for i in range(K - first):
                logits[b, 0, i] = dot(W_o[i], hidden) + b_o[i]
                rho[first + i] = logits[b, 0, i] + bias[b, 0, i]
            softmax_(rho[first:])
            if 0 < top_k < K - first:
                keep_largest(rho[first:], top_k)
            # addresses: unit length times 1 + softplus(strength)
            at = R + 2 * m
            for part in range(2):
                target = query if part == 0 else key
                source = row[R + part * m : R + (part + 1) * m]
                s = row[at + part]
                strength = 1 + (s if s > 20 else math.log1p(math.exp(s)))
                scale = real(strength / max(math.sqrt(dot(source, source)), 1e-12))
                for j in range(m):
                    target[j] = source[j] * scale
            at += 2
            gate, erase = real(sigmoid(row[at + m])), real(sigmoid(row[at + m + 1]))
            for j in range(m):
                value[j] = math.tanh(row[at + j])
            if cap < math.inf:
                largest = MAX_ERASE * cap * erase / max(math.sqrt(dot(value, value)), 1e-6)
                if largest < 1:
                    value *= real(largest)
            at += m + 2
            c[:] = 0
            for k in range(K):
                for s in range(S):
                    slot = keys[k, s]
                    length = real(1 / max(math.sqrt(dot(slot, slot)), 1e-12))
                    read[s] = dot(query, slot) * length
                    write[s] = dot(key, slot) * length
                softmax_(read)
                softmax_(write)
                for s in range(S):
                    a, w = rho[k] * read[s], rho[k] * gate * write[s]
                    keep = real(decay) * (real(1) - real(MAX_ERASE) * w * erase)
                    old, new = M0[b, k, s], M[b, k, s]
                    short = real(1)
                    if cap < math.inf:
                        short = real(min(cap / max(math.sqrt(dot(old, old)), 1e-6), 1.0))
                    for j in range(m):
                        c[j] += a * short * old[j]
                        new[j] = keep * short * old[j] + w * value[j]
            c *= real(1 / math.sqrt(dot(c, c) / m + READ_EPS))
            for i in range(H):
                z = real(sigmoid(row[at + i] + dot(W_c[i], c)))
                n = real(math.tanh(row[at + H + i] + dot(W_c[H + i], c)))
                h[b, i] = (1 - z) * h0[b, i] + z * n

    return run
