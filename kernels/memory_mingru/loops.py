"""One token of the parallel cell for one CPU thread, compiled by numba, from the pieces of the sequential cell."""

import numpy as np

from memzoo.kernels.gated_slots.reference import MAX_ERASE
from memzoo.kernels.memory_gru.elements import add_matvec, dot, jit, one_plus_softplus, sigmoid, softmax, tanh
from memzoo.kernels.memory_gru.loops import route
from memzoo.kernels.memory_mingru.fused import READ_EPS


@jit
def step(x, h0, M0, router_out, router_out_bias, keys, gates_c, bias, h, logits, M, top_k, shared, decay, cap):
    """x [B, 1, P]; logits [B, 1, Kr] and h [B, H] out; M0 [B, K, S, m] in, M out. cap 0 is none, top_k Kr is all."""
    B, K, S, m = M0.shape
    R, H = router_out.shape[1], h0.shape[1]
    real = x.dtype.type
    one, zero = real(1), real(0)
    hidden, rho, scores = np.empty(R, x.dtype), np.empty(K, x.dtype), np.empty(K - shared, x.dtype)
    query, key, value, c = np.empty(m, x.dtype), np.empty(m, x.dtype), np.empty(m, x.dtype), np.empty(m, x.dtype)
    read, write = np.empty((K, S), x.dtype), np.empty((K, S), x.dtype)
    lengths, gates = np.empty((K, S), x.dtype), np.empty(2 * H, x.dtype)
    for k in range(K):
        for s in range(S):
            lengths[k, s] = one / max(np.sqrt(dot(keys[k, s], keys[k, s])), real(1e-12))
    for b in range(B):
        row = x[b, 0]
        for i in range(R):
            hidden[i] = zero if row[i] < zero else row[i]
        for i in range(K - shared):
            logits[b, 0, i] = dot(router_out[i], hidden) + router_out_bias[i]
            scores[i] = logits[b, 0, i] + bias[b, 0, i]
        route(rho, scores, top_k, shared)

        at = R + 2 * m
        for part in range(2):  # unit length times 1 + softplus(strength)
            target = query if part == 0 else key
            source = row[R + part * m : R + (part + 1) * m]
            scale = one_plus_softplus(row[at + part]) / max(np.sqrt(dot(source, source)), real(1e-12))
            for j in range(m):
                target[j] = source[j] * scale
        at += 2
        gate, erase = sigmoid(row[at + m]), sigmoid(row[at + m + 1])
        for j in range(m):
            value[j] = tanh(row[at + j])
        if cap > 0:
            shorter = min(real(MAX_ERASE) * real(cap) * erase / max(np.sqrt(dot(value, value)), real(1e-6)), one)
            for j in range(m):
                value[j] *= shorter
        at += m + 2

        c[:] = 0
        for k in range(K):
            weight = rho[k] if rho[k] > zero else zero  # route marks unused banks by their sign
            for part in range(2):
                cosines, target = (read[k], query) if part == 0 else (write[k], key)
                cosines[:] = 0
                add_matvec(cosines, keys[k], target)
                for s in range(S):
                    cosines[s] *= lengths[k, s]
                softmax(cosines)
            for s in range(S):
                old, new = M0[b, k, s], M[b, k, s]
                kept = one
                if cap > 0:
                    kept = min(real(cap) / max(np.sqrt(dot(old, old)), real(1e-6)), one)
                a, w = weight * read[k, s] * kept, weight * gate * write[k, s]
                keep = real(decay) * (one - real(MAX_ERASE) * w * erase) * kept
                for j in range(m):
                    c[j] += a * old[j]
                    new[j] = keep * old[j] + w * value[j]
        scale = one / np.sqrt(dot(c, c) / real(m) + real(READ_EPS))
        for j in range(m):
            c[j] *= scale
        gates[:] = row[at:]
        add_matvec(gates, gates_c, c)
        for i in range(H):
            z, n = sigmoid(gates[i]), tanh(gates[H + i])
            h[b, i] = (one - z) * h0[b, i] + z * n
