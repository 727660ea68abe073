"""The recurrent cell of MARU as a plain loop: this file is the definition, and what runs where numba can't.

A GRU cell with K memory banks of S slots ("mixture of memories"), erase / add writes and cosine addressing as in
Neural Turing Machines (arXiv 1410.5401, eq. 3-6). Only what depends on h_{t-1} is here; the caller projects the
inputs.

    l = W_o relu(x_router + W_r h) + b_o,  rho = topk(softmax((l + router_bias) / temperature)), bank 0 = 1 if shared
    [q; s] = x_query + W_q h,  alpha_k = softmax_S((1 + softplus(s)) cos(M_k, q)),  c = sum_k rho_k alpha_k' M_k
    r, z = sigmoid(x + W_c c + W_h h),  n = tanh(x_n + W_cn c + W_hn (r * h)),  h' = z * h + (1 - z) * n
    [key; s; g; e; a] = W_w h' + b_w,  w_k = rho_k sigmoid(g) softmax_S((1 + softplus(s)) cos(M_k, key))
    M' = cap(decay * M * (1 - w sigmoid(e)') + w tanh(a)')

B batch, T time, H cell, K banks, Kr routed banks (K - 1 with a shared bank), S slots, m memory, R router hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Compiled into loops.py, whose cache follows the date of that file: touch it after changing these.
EPS = 1e-6  # added to squared norms: the cosine has finite gradients at zero vectors
CAP_SLACK = (
    1e-5  # relative, on squared norms: rounding alone never rescales a slot that an earlier step put at the cap
)


class MemoryGRUWeights(NamedTuple):
    """The weights that meet the state; biases of the input projections belong to the inputs."""

    router_h: Tensor  # [R, H]
    router_out: Tensor  # [Kr, R]
    router_out_bias: Tensor  # [Kr]
    query_h: Tensor  # [m + 1, H]: read query, read strength
    gates_c: Tensor  # [3H, m]: reset, update, candidate
    gates_h: Tensor  # [3H, H]: reset, update, candidate
    write: Tensor  # [3m + 2, H]: key m, strength 1, gate 1, erase m, add m
    write_bias: Tensor  # [3m + 2]


def route(scores: Tensor, top_k: int | None, shared_bank: bool) -> Tensor:
    """Bank weights rho [..., K] from scores [..., Kr]: softmax, the top k as they are, 1 for a shared bank.

    They are not renormalised: with k = 1 the weight would be 1 and no gradient would reach the router (Switch
    Transformers, arXiv 2101.03961, eq. 2). Ties go to the lower bank.
    """
    rho = scores.softmax(-1)
    if top_k is not None:
        order = rho.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(rho).scatter(-1, order[..., :top_k], 1.0)
        rho = rho * kept
    return torch.cat([torch.ones_like(rho[..., :1]), rho], dim=-1) if shared_bank else rho


def address(M: Tensor, key: Tensor, strength: Tensor) -> Tensor:
    """softmax over slots of (1 + softplus(strength)) cos(M, key): [B, K, S, m], [B, m], [B, 1] -> [B, K, S]."""
    M_norm = (M.square().sum(-1) + EPS).sqrt()
    key_norm = (key.square().sum(-1) + EPS).sqrt()
    cosine = torch.einsum("bksm,bm->bks", M, key) / (M_norm * key_norm[:, None, None])
    return ((1 + softplus(strength))[:, :, None] * cosine).softmax(-1)


def memory_gru_step_reference(
    x_router: Tensor,  # [B, R]
    x_query: Tensor,  # [B, m + 1]
    x_gates: Tensor,  # [B, 3H]
    h: Tensor,  # [B, H]
    M: Tensor,  # [B, K, S, m]
    weights: MemoryGRUWeights,
    router_bias: Tensor,  # [Kr] or [B, Kr]
    temperature: float = 1.0,
    top_k: int | None = None,
    shared_bank: bool = False,
    decay: float = 1.0,
    slot_norm_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step; returns h' [B, H], M' [B, K, S, m], router logits [B, Kr] and write weights w [B, K, S]."""
    m = M.shape[-1]
    logits = (x_router + h @ weights.router_h.T).relu() @ weights.router_out.T + weights.router_out_bias
    rho = route((logits + router_bias) / temperature, top_k, shared_bank)

    query, strength = (x_query + h @ weights.query_h.T).split([m, 1], dim=-1)
    c = torch.einsum("bks,bksm->bm", rho[:, :, None] * address(M, query, strength), M)

    reset_h, update_h, candidate_h = weights.gates_h.chunk(3)
    reset, update, candidate = (x_gates + c @ weights.gates_c.T).chunk(3, dim=-1)
    reset = (reset + h @ reset_h.T).sigmoid()
    update = (update + h @ update_h.T).sigmoid()
    candidate = (candidate + (reset * h) @ candidate_h.T).tanh()
    h = update * h + (1 - update) * candidate

    key, strength, gate, erase, add = (h @ weights.write.T + weights.write_bias).split([m, 1, 1, m, m], dim=-1)
    w = (rho * gate.sigmoid())[:, :, None] * address(M, key, strength)
    erased = w[..., None] * erase.sigmoid()[:, None, None, :]
    M = decay * M * (1 - erased) + w[..., None] * add.tanh()[:, None, None, :]
    if slot_norm_cap is not None:
        norm2 = M.square().sum(-1, keepdim=True)
        limit = slot_norm_cap**2
        over = norm2 > limit * (1 + CAP_SLACK)
        M = M * torch.where(over, (limit / norm2.clamp(min=limit)).sqrt(), 1.0)
    return h, M, logits, w


def memory_gru_reference(
    x_router: Tensor,  # [B, T, R]
    x_query: Tensor,  # [B, T, m + 1]
    x_gates: Tensor,  # [B, T, 3H]
    h: Tensor,  # [B, H]
    M: Tensor,  # [B, K, S, m]
    weights: MemoryGRUWeights,
    router_bias: Tensor | None = None,  # [Kr] or [B, T, Kr]
    mask: Tensor | None = None,  # [B, T], nonzero = real token
    temperature: float = 1.0,
    top_k: int | None = None,
    shared_bank: bool = False,
    decay: float = 1.0,
    slot_norm_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps; returns h_seq [B, T, H], router logits [B, T, Kr], h_T, M_T, writes [B, T, K, S].

    A masked step leaves h and M untouched bit for bit, repeats h, and has zero logits and writes; what its inputs hold
    (NaN included) reaches nothing.
    """
    T = x_gates.shape[1]
    if mask is not None:
        mask = mask.bool()
        x_router, x_query, x_gates = (torch.where(mask[..., None], x, 0) for x in (x_router, x_query, x_gates))
    if router_bias is None:
        router_bias = torch.zeros_like(weights.router_out_bias)
    elif mask is not None and router_bias.dim() == 3:
        router_bias = torch.where(mask[..., None], router_bias, 0)
    biases = router_bias.unbind(1) if router_bias.dim() == 3 else [router_bias] * T

    outputs = []
    for t, (router, query, gates) in enumerate(zip(x_router.unbind(1), x_query.unbind(1), x_gates.unbind(1))):
        h_new, M_new, logits, writes = memory_gru_step_reference(
            router, query, gates, h, M, weights, biases[t], temperature, top_k, shared_bank, decay, slot_norm_cap
        )
        if mask is not None:
            real = mask[:, t]
            h_new, M_new = torch.where(real[:, None], h_new, h), torch.where(real[:, None, None, None], M_new, M)
            logits, writes = torch.where(real[:, None], logits, 0), torch.where(real[:, None, None], writes, 0)
        h, M = h_new, M_new
        outputs.append((h, logits, writes))
    h_seq, logits, writes = (torch.stack(column, dim=1) for column in zip(*outputs))
    return h_seq, logits, h, M, writes
