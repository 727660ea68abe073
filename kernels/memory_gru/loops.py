"""The loops of memory_gru for one CPU thread, compiled by numba: `forward` and `backward`, and the steps they share.

The equations are in reference.py. A thread takes whole sequences, so that a sequence's banks (K S m numbers) and the
weights stay in its core's cache for all T steps. Every array is contiguous, and slicing keeps it so: unpacking an
array loses the contiguous layout, and with it the vector loops.
"""

import numpy as np

from memzoo.kernels.memory_gru.elements import (
    add_matvec,
    add_vecmat,
    dot,
    exp,
    jit,
    like,
    maximum,
    one_plus_softplus,
    sigmoid,
    softmax,
    tanh,
)
from memzoo.kernels.memory_gru.reference import CAP_SLACK, EPS

CHUNK = 16  # steps between two kept copies of the banks


@jit
def route(rho, scores, top_k, shared):
    """rho [K] from scores [Kr]: softmax; all but the top_k (ties to the lower bank) are negated: they are not used.

    The backward needs their probabilities, since the softmax is over all scores.
    """
    top = maximum(scores)
    total = like(top, 0.0)
    for i in range(scores.shape[0]):
        rho[shared + i] = exp(scores[i] - top)
        total += rho[shared + i]
    for i in range(scores.shape[0]):
        rank = 0
        for j in range(scores.shape[0]):
            rank += scores[j] > scores[i] or (scores[j] == scores[i] and j < i)
        rho[shared + i] /= total if rank < top_k else -total
    for i in range(shared):
        rho[i] = 1


@jit
def address(out, M, inverse_norm, key, strength):
    """out [S] = softmax(strength cos(M, key)), M [S, m]."""
    scale = strength / np.sqrt(dot(key, key) + like(strength, EPS))
    out[:] = 0
    add_matvec(out, M, key)
    for s in range(out.shape[0]):
        out[s] *= scale * inverse_norm[s]
    softmax(out)


@jit
def norms(inverse_norm, M):
    one, eps = like(M[0, 0], 1.0), like(M[0, 0], EPS)
    for s in range(M.shape[0]):
        inverse_norm[s] = one / np.sqrt(dot(M[s], M[s]) + eps)


@jit
def write(M, inverse_norm, scale, address, erase, add, decay, cap):
    """In place M [S, m] = cap(M (decay - w erase') + w add') with w = scale address; erase includes decay."""
    one, eps = like(scale, 1.0), like(scale, EPS)
    limit = cap * cap
    for s in range(M.shape[0]):
        w = scale * address[s]
        norm2 = like(scale, 0.0)
        for j in range(M.shape[1]):
            v = M[s, j] * (decay - w * erase[j]) + w * add[j]
            M[s, j] = v
            norm2 += v * v
        if cap > 0 and norm2 > limit * like(scale, 1 + CAP_SLACK):
            shrink = np.sqrt(limit / norm2)
            for j in range(M.shape[1]):
                M[s, j] *= shrink
            norm2 = limit
        inverse_norm[s] = one / np.sqrt(norm2 + eps)


@jit
def parts(row, R, K, m, H):
    """The activations of one step: router pre-activation R, rho K (see route), query and strength m + 1, c m,
    (r, z, n) 3H, write 3m + 2 (key, strength, and gate, erase, add after their sigmoid, sigmoid, tanh)."""
    i1 = R + K
    i2 = i1 + m + 1
    i3 = i2 + m
    i4 = i3 + 3 * H
    return row[:R], row[R:i1], row[i1:i2], row[i2:i3], row[i3:i4], row[i4:]


@jit
def forward(
    x_router, x_query, x_gates, bias, mask, h0,
    router_h, router_out, router_out_bias, query_h, gates_c, gates_h, write_w, write_b,
    temperature, top_k, shared, decay, cap,
    h_seq, logits, M_all, acts, addresses, checkpoints, first, last,
):  # fmt: skip
    """Sequences first..last. M_all: M0 on entry, M_T on return. acts and addresses may hold a single step."""
    T, H = h_seq.shape[1:]
    K, S, m = M_all.shape[1:]
    R, Kr = x_router.shape[2], logits.shape[2]
    one, zero = like(h0[0, 0], 1.0), like(h0[0, 0], 0.0)
    temperature, decay, cap = like(one, temperature), like(one, decay), like(one, cap)
    h, reset_h, gates = np.empty_like(h0[0]), np.empty_like(h0[0]), np.empty_like(x_gates[0, 0])
    hidden, scores = np.empty_like(x_router[0, 0]), np.empty_like(logits[0, 0])
    erase = np.empty_like(M_all[0, 0, 0])
    inverse_norm = np.empty((K, S), h0.dtype)
    for b in range(first, last):
        M = M_all[b]
        h[:] = h0[b]
        for k in range(K):
            norms(inverse_norm[k], M[k])
        for t in range(T):
            if checkpoints.shape[1] > 0 and t % CHUNK == 0:
                checkpoints[b, t // CHUNK * K : (t // CHUNK + 1) * K] = M
            i = t % acts.shape[1]
            act, read, written = acts[b, i], addresses[b, i, 0], addresses[b, i, 1]
            if mask.shape[0] > 0 and not mask[b, t]:
                h_seq[b, t] = h
                logits[b, t] = 0
                act[:] = 0
                read[:] = 0
                written[:] = 0
                continue
            pre, rho, query, c, rzn, u = parts(act, R, K, m, H)

            pre[:] = x_router[b, t]
            add_matvec(pre, router_h, h)
            for r in range(R):
                hidden[r] = zero if pre[r] < zero else pre[r]
            logits[b, t] = router_out_bias
            add_matvec(logits[b, t], router_out, hidden)
            for k in range(Kr):
                extra = bias[min(b, bias.shape[0] - 1), min(t, bias.shape[1] - 1), k]
                scores[k] = (logits[b, t, k] + extra) / temperature
            route(rho, scores, top_k, shared)

            query[:] = x_query[b, t]
            add_matvec(query, query_h, h)
            strength = one_plus_softplus(query[m])
            c[:] = 0
            for k in range(K):
                if rho[k] <= zero:
                    read[k] = 0
                else:
                    address(read[k], M[k], inverse_norm[k], query[:m], strength)
                    add_vecmat(c, rho[k], read[k], M[k])

            gates[:] = x_gates[b, t]
            add_matvec(gates, gates_c, c)
            add_matvec(gates[: 2 * H], gates_h[: 2 * H], h)
            for j in range(2 * H):
                rzn[j] = sigmoid(gates[j])
            for j in range(H):
                reset_h[j] = rzn[j] * h[j]
            add_matvec(gates[2 * H :], gates_h[2 * H :], reset_h)
            for j in range(2 * H, 3 * H):
                rzn[j] = tanh(gates[j])
            for j in range(H):
                h[j] = rzn[H + j] * (h[j] - rzn[2 * H + j]) + rzn[2 * H + j]
            h_seq[b, t] = h

            u[:] = write_b
            add_matvec(u, write_w, h)
            for j in range(m + 1, 2 * m + 2):
                u[j] = sigmoid(u[j])
            for j in range(2 * m + 2, 3 * m + 2):
                u[j] = tanh(u[j])
            for j in range(m):
                erase[j] = decay * u[m + 2 + j]
            strength = one_plus_softplus(u[m])
            for k in range(K):
                if rho[k] <= zero:
                    written[k] = 0
                    if decay == one and cap == zero:
                        continue
                else:
                    address(written[k], M[k], inverse_norm[k], u[:m], strength)
                write(M[k], inverse_norm[k], rho[k] * u[m + 1], written[k], erase, u[2 * m + 2 :], decay, cap)


@jit
def write_backward(dM, dw, M, M_key, inverse_norm, scale, address, key, erase, add, derase, dadd, decay, cap):
    """From dM = gradient of write(M): dM of M in place, dw [S]; adds to derase and dadd. Also M_key = M key.

    erase includes decay, and so does derase.
    """
    zero, limit = like(scale, 0.0), cap * cap
    for s in range(M.shape[0]):
        w = scale * address[s]
        if cap > zero:
            norm2, along = zero, zero
            for j in range(M.shape[1]):
                v = M[s, j] * (decay - w * erase[j]) + w * add[j]
                norm2 += v * v
                along += v * dM[s, j]
            if norm2 > limit * like(scale, 1 + CAP_SLACK):
                shrink = np.sqrt(limit / norm2)
                along /= norm2
                for j in range(M.shape[1]):
                    v = M[s, j] * (decay - w * erase[j]) + w * add[j]
                    dM[s, j] = shrink * (dM[s, j] - along * v)
        from_add, from_erase, product = zero, zero, zero
        for j in range(M.shape[1]):
            from_add += dM[s, j] * add[j]
            from_erase += dM[s, j] * M[s, j] * erase[j]
            product += M[s, j] * key[j]
        dw[s] = from_add - from_erase
        M_key[s] = product
        for j in range(M.shape[1]):
            dadd[j] += w * dM[s, j]
            derase[j] -= w * dM[s, j] * M[s, j]
        for j in range(M.shape[1]):
            dM[s, j] *= decay - w * erase[j]


@jit
def address_backward(to_key, to_M, daddress, address, M_key, inverse_norm, key_inverse, strength):
    """Gradient of softmax(strength cos(M, key)), given M_key = M key.

    Sets dkey = to_key M - shrink key and dM += to_key key' + to_M M; returns dstrength and shrink.
    """
    mean, dstrength, shrink = like(strength, 0.0), like(strength, 0.0), like(strength, 0.0)
    for s in range(address.shape[0]):
        mean += address[s] * daddress[s]
    for s in range(address.shape[0]):
        dlogit = address[s] * (daddress[s] - mean)
        cosine = M_key[s] * inverse_norm[s] * key_inverse
        dstrength += dlogit * cosine
        shrink += dlogit * cosine
        to_key[s] = strength * dlogit * inverse_norm[s] * key_inverse
        to_M[s] -= strength * dlogit * cosine * inverse_norm[s] * inverse_norm[s]
    return dstrength, shrink * strength * key_inverse * key_inverse


@jit
def add_outer(dM, to_key, key, to_query, query, rho, read, dc, to_M, M):
    """dM += to_key key' + to_query query' + rho read dc' + to_M M"""
    for s in range(M.shape[0]):
        x_key, x_query, x_dc, x_M = to_key[s], to_query[s], rho * read[s], to_M[s]
        for j in range(M.shape[1]):
            dM[s, j] += x_key * key[j] + x_query * query[j] + x_dc * dc[j] + x_M * M[s, j]


@jit
def backward(
    mask, h0, h_seq, acts, addresses, checkpoints,
    router_h, router_out, query_h, gates_c, gates_h, write_w, temperature, decay, cap,
    dh_seq, dlogits, dM_all, dh0, deltas, first, last,
):  # fmt: skip
    """dM_all holds the gradient of M_T on entry and that of M0 on return. deltas: gradients of the pre-activations,
    x_router R, x_query m + 1, x_gates 3H, write 3m + 2, scores Kr, logits Kr."""
    T, H = h_seq.shape[1:]
    K, S, m = dM_all.shape[1:]
    R, Kr = router_h.shape[0], dlogits.shape[2]
    shared = K - Kr
    one, zero, eps = like(h0[0, 0], 1.0), like(h0[0, 0], 0.0), like(h0[0, 0], EPS)
    temperature, decay, cap = like(one, temperature), like(one, decay), like(one, cap)
    banks = np.empty((CHUNK, K, S, m), h0.dtype)
    inverse_norms = np.empty((CHUNK, K, S), h0.dtype)
    by_slot, by_dim, by_cell = np.empty((5, S), h0.dtype), np.empty((4, m), h0.dtype), np.empty((3, H), h0.dtype)
    dwrite, M_query, M_key, M_dc, to_query = by_slot[0], by_slot[1], by_slot[2], by_slot[3], by_slot[4]
    erase, derase, dadd, dc = by_dim[0], by_dim[1], by_dim[2], by_dim[3]
    dh, dh_prev, dreset_h = by_cell[0], by_cell[1], by_cell[2]
    to_key, to_M, drho = np.empty((K, S), h0.dtype), np.empty((K, S), h0.dtype), np.empty(K, h0.dtype)
    for b in range(first, last):
        dM = dM_all[b]
        dh[:] = 0
        for start in range((T - 1) // CHUNK * CHUNK, -1, -CHUNK):
            stop = min(start + CHUNK, T)
            banks[0] = checkpoints[b, start // CHUNK * K : (start // CHUNK + 1) * K]
            for k in range(K):
                norms(inverse_norms[0, k], banks[0, k])
            for t in range(start, stop - 1):
                i = t - start
                _, rho, _, _, _, u = parts(acts[b, t], R, K, m, H)
                real = mask.shape[0] == 0 or mask[b, t]
                for j in range(m):
                    erase[j] = decay * u[m + 2 + j]
                for k in range(K):
                    banks[i + 1, k] = banks[i, k]
                    inverse_norms[i + 1, k] = inverse_norms[i, k]
                    if real and not (rho[k] <= zero and decay == one and cap == zero):
                        write(
                            banks[i + 1, k], inverse_norms[i + 1, k], rho[k] * u[m + 1], addresses[b, t, 1, k],
                            erase, u[2 * m + 2 :], decay, cap,
                        )  # fmt: skip

            for t in range(stop - 1, start - 1, -1):
                for j in range(H):
                    dh[j] += dh_seq[b, t, j]
                delta = deltas[b, t]
                if mask.shape[0] > 0 and not mask[b, t]:
                    delta[:] = 0
                    continue
                M, inverse_norm = banks[t - start], inverse_norms[t - start]
                h = h_seq[b, t - 1] if t > 0 else h0[b]
                pre, rho, query, _, rzn, u = parts(acts[b, t], R, K, m, H)
                dpre, dquery = delta[:R], delta[R : R + m + 1]
                dgates = delta[R + m + 1 : R + m + 1 + 3 * H]
                du = delta[R + m + 1 + 3 * H : R + 3 * m + m + 3 + 3 * H]
                dscores, dl = delta[delta.shape[0] - 2 * Kr : delta.shape[0] - Kr], delta[delta.shape[0] - Kr :]

                # Write.
                key, add, gate = u[:m], u[2 * m + 2 :], u[m + 1]
                strength, key_inverse = one_plus_softplus(u[m]), one / np.sqrt(dot(key, key) + eps)
                for j in range(m):
                    erase[j] = decay * u[m + 2 + j]
                derase[:] = 0
                dadd[:] = 0
                du[:] = 0
                to_M[:] = 0
                shrink, dgate = zero, zero
                for k in range(K):
                    drho[k] = 0
                    to_key[k] = 0
                    if rho[k] <= zero and decay == one and cap == zero:
                        continue
                    write_backward(
                        dM[k], dwrite, M[k], M_key, inverse_norm[k], rho[k] * gate, addresses[b, t, 1, k], key,
                        erase, add, derase, dadd, decay, cap,
                    )  # fmt: skip
                    if rho[k] <= zero:
                        continue
                    inner = dot(dwrite, addresses[b, t, 1, k])
                    drho[k] = gate * inner
                    dgate += rho[k] * inner
                    for s in range(S):
                        dwrite[s] *= rho[k] * gate
                    dstrength, dshrink = address_backward(
                        to_key[k],
                        to_M[k],
                        dwrite,
                        addresses[b, t, 1, k],
                        M_key,
                        inverse_norm[k],
                        key_inverse,
                        strength,
                    )
                    du[m] += dstrength
                    shrink += dshrink
                    add_vecmat(du[:m], one, to_key[k], M[k])
                for j in range(m):
                    du[j] -= shrink * key[j]
                    du[m + 2 + j] = decay * derase[j] * u[m + 2 + j] * (one - u[m + 2 + j])
                    du[2 * m + 2 + j] = dadd[j] * (one - add[j] * add[j])
                du[m] *= sigmoid(u[m])
                du[m + 1] = dgate * gate * (one - gate)
                add_vecmat(dh, one, du, write_w)

                # Gates.
                for j in range(H):
                    z, n = rzn[H + j], rzn[2 * H + j]
                    dgates[H + j] = dh[j] * (h[j] - n) * z * (one - z)
                    dgates[2 * H + j] = dh[j] * (one - z) * (one - n * n)
                    dh_prev[j] = dh[j] * z
                dreset_h[:] = 0
                add_vecmat(dreset_h, one, dgates[2 * H :], gates_h[2 * H :])
                for j in range(H):
                    r = rzn[j]
                    dgates[j] = dreset_h[j] * h[j] * r * (one - r)
                    dh_prev[j] += dreset_h[j] * r
                add_vecmat(dh_prev, one, dgates[: 2 * H], gates_h[: 2 * H])
                dc[:] = 0
                add_vecmat(dc, one, dgates, gates_c)

                # Read.
                q = query[:m]
                strength, query_inverse = one_plus_softplus(query[m]), one / np.sqrt(dot(q, q) + eps)
                dquery[:] = 0
                shrink = zero
                for k in range(K):
                    if rho[k] <= zero:
                        continue
                    read = addresses[b, t, 0, k]
                    M_dc[:] = 0
                    M_query[:] = 0
                    add_matvec(M_dc, M[k], dc)
                    add_matvec(M_query, M[k], q)
                    drho[k] += dot(M_dc, read)
                    for s in range(S):
                        M_dc[s] *= rho[k]
                    dstrength, dshrink = address_backward(
                        to_query, to_M[k], M_dc, read, M_query, inverse_norm[k], query_inverse, strength
                    )
                    dquery[m] += dstrength
                    shrink += dshrink
                    add_vecmat(dquery[:m], one, to_query, M[k])
                    add_outer(dM[k], to_key[k], key, to_query, q, rho[k], read, dc, to_M[k], M[k])
                for j in range(m):
                    dquery[j] -= shrink * q[j]
                dquery[m] *= sigmoid(query[m])
                add_vecmat(dh_prev, one, dquery, query_h)

                # Router.
                mean = dot(rho[shared:], drho[shared:])
                for k in range(Kr):
                    dscores[k] = abs(rho[shared + k]) * (drho[shared + k] - mean) / temperature
                    dl[k] = dscores[k] + dlogits[b, t, k]
                dpre[:] = 0
                add_vecmat(dpre, one, dl, router_out)
                for r in range(R):
                    dpre[r] = dpre[r] if pre[r] > zero else zero
                add_vecmat(dh_prev, one, dpre, router_h)
                dh[:] = dh_prev
        dh0[b] = dh
