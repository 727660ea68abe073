"""The parallel cell of MARU: a minGRU (arXiv 2410.01201) that reads K banks of gated slots (arXiv 2409.07146).

No gate and no address depends on h_{t-1} or on what is remembered, so the banks and h are linear recurrences: the
whole sequence takes a few matrix products. One token without gradients on the CPU is one compiled loop (fused.py).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.gated_slots import MAX_ERASE, gated_slots, write_weights
from memzoo.kernels.memory_gru.reference import route
from memzoo.kernels.memory_mingru import fused
from memzoo.kernels.memory_mingru.fused import READ_EPS
from memzoo.kernels.memory_mingru.mingru import mingru
from memzoo.kernels.rms_norm import rms_norm

__all__ = ["MemoryMinGRUWeights", "memory_mingru", "mingru", "split_sizes"]


class MemoryMinGRUWeights(NamedTuple):
    """The weights that do not meet the input directly; biases of the input projection belong to x."""

    router_out: Tensor  # [Kr, R]
    router_out_bias: Tensor  # [Kr]
    slot_keys: Tensor  # [K, S, m]
    gates_c: Tensor  # [2H, m]: update, candidate


def split_sizes(router_hidden: int, m: int, H: int) -> list[int]:
    """Parts of x: router, addresses (read, write), their strengths, value, gate, erase, gates (update, candidate)."""
    return [router_hidden, 2 * m, 2, m, 1, 1, 2 * H]


def memory_mingru(
    x: Tensor,
    h0: Tensor,
    M0: Tensor,
    weights: MemoryMinGRUWeights,
    router_bias: Tensor,
    *,
    mask: Tensor | None = None,
    top_k: int | None = None,
    shared_bank: bool = False,
    decay: float = 1.0,
    slot_norm_cap: float | None = None,
    return_writes: bool = False,
) -> tuple:
    """Run the cell over a sequence and return (h_seq, router_logits, (h_T, M_T)), plus writes if asked.

    l = W_o relu(x_router) + b_o,  rho = topk(softmax(l + router_bias)), bank 0 = 1 if shared
    address = softmax_S((1 + softplus(strength)) cos(query, slot_key)), one to read and one to write
    c_t = rho read' M_{t-1};  M_t = decay (1 - MAX_ERASE w e) M_{t-1} + w v',  w = rho sigmoid(gate) write
    z, n = sigmoid, tanh of x_gates + W_c c / sqrt(mean(c^2) + READ_EPS);  h_t = (1 - z) h_{t-1} + z n

    with e = sigmoid(erase), v = tanh(value). The read is normalised because what a slot holds after one write is
    small: without it almost no gradient reaches the memory at the start. With a cap, |v| <= MAX_ERASE e cap, which
    keeps every slot's norm below the cap if it starts there (M0 is shortened to it) and leaves the recurrence linear.

    Args:
        x: [B, T, P], the projected input, its parts as in `split_sizes`.
        h0: [B, H]. M0: [B, K, S, m].
        router_bias: [Kr] or [B, T, Kr], with Kr routed banks (K - 1 with a shared bank).
        mask: [B, T], 0 leaves the state exactly as it was.

    Returns:
        h_seq [B, T, H] in x's dtype; router_logits [B, T, Kr]; the state in at least float32; writes [B, T, K, S].

    Raises:
        ValueError: x does not have the width that the weights and the state imply.
    """
    K, S, m = weights.slot_keys.shape
    sizes = split_sizes(weights.router_out.shape[1], m, h0.shape[1])
    if x.ndim != 3 or x.shape[-1] != sum(sizes):
        raise ValueError(f"x is {list(x.shape)}, expected [B, T, {sum(sizes)}], that is {' + '.join(map(str, sizes))}")
    options = (top_k, shared_bank, decay, slot_norm_cap)
    if not return_writes and fused.is_available(x, mask, [x, h0, M0, *weights]):
        return fused.step(x, h0, M0, weights, router_bias, *options)

    x_router, addresses, strengths, value, gate, erase, gates = x.split(sizes, dim=-1)
    logits = F.linear(x_router.relu().to(weights.router_out.dtype), weights.router_out, weights.router_out_bias)
    rho = route(logits + router_bias, top_k, shared_bank)
    value, gate, erase = value.tanh(), gate.sigmoid().squeeze(-1), erase.sigmoid().squeeze(-1)
    if slot_norm_cap is not None:
        value = shorten(value, (MAX_ERASE * slot_norm_cap * erase)[..., None])
        M0 = shorten(M0, slot_norm_cap)
    queries = F.normalize(addresses.unflatten(-1, (2, m)), dim=-1) * (1 + F.softplus(strengths))[..., None]
    addresses = queries @ F.normalize(weights.slot_keys, dim=-1).view(K * S, m).mT  # [B, T, 2, K S]
    arguments = (addresses.unflatten(-1, (K, S)), rho, gate, erase, value, M0)
    c, M = gated_slots(*arguments, decay=decay, mask=mask)
    read = F.linear(normalised(c).to(weights.gates_c.dtype), weights.gates_c).to(x.dtype)
    h, h_last = mingru(gates + read, h0, mask)
    if not return_writes:
        return h, logits, (h_last, M)
    return h, logits, (h_last, M), write_weights(*arguments[:3], mask).detach()


def normalised(c: Tensor) -> Tensor:
    """c / sqrt(mean(c^2) + READ_EPS) over the last dim."""
    return rms_norm(c, None, READ_EPS)


def shorten(x: Tensor, largest: Tensor | float) -> Tensor:
    """Vectors along the last dim, shortened to a largest norm."""
    return x * (largest / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)
