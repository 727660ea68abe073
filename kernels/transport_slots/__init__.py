"""Slots that tokens are assigned to, block by block, by entropic optimal transport (Cuturi 2013, arXiv 1306.0895).

The counterpart of `slot_memory` with addresses by content: tokens alike go to the same slot, and no slot takes more
than one token's worth in a block. `reference.py` is the definition, `chunked.py` computes sequences.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from memzoo.kernels.slot_memory import SlotRead
from memzoo.kernels.transport_slots.chunked import transport_slots_chunked
from memzoo.kernels.transport_slots.reference import transport_slots as reference
from memzoo.kernels.transport_slots.sinkhorn import sinkhorn

__all__ = ["TransportState", "empty_transport", "reference", "sinkhorn", "transport_slots"]


class TransportState(NamedTuple):
    """M slots and the S places of the block that is being filled, in at least float32."""

    key: Tensor  # [B, H, M, dk], sums of keys with the masses that strength counts
    value: Tensor  # [B, H, M, dv], likewise
    strength: Tensor  # [B, H, M], mass in each slot, 0: empty
    pending_key: Tensor  # [B, H, S, dk]
    pending_value: Tensor  # [B, H, S, dv]
    pending_mass: Tensor  # [B, S]
    position: Tensor  # [B] int64, tokens in the block, below S


def empty_transport(
    batch_size: int,
    num_heads: int,
    num_slots: int,
    block_size: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> TransportState:
    """The state before the first token."""
    B, H = batch_size, num_heads
    shapes = [(B, H, num_slots, key_dim), (B, H, num_slots, value_dim), (B, H, num_slots)]
    shapes += [(B, H, block_size, key_dim), (B, H, block_size, value_dim), (B, block_size)]
    zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    return TransportState(*zeros, torch.zeros(B, dtype=torch.int64, device=device))


def transport_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prototypes: Tensor,
    state: TransportState,
    mass: Tensor,
    mask: Tensor | None = None,
    rate: float = 0.5,
    decay: float = 1.0,
    top_k: int | None = None,
    epsilon: float = 0.05,
    iterations: int = 10,
    return_entropy: bool = False,
    implementation: Literal["auto", "reference", "chunked"] = "auto",
) -> tuple[SlotRead, TransportState]:
    """Read M slots for every token; write them at the end of every S real tokens.

        s_m = q_t K_m / |K_m| + log strength_m,  w = softmax of the top_k largest,  y_t = sum_m w_m V_m / strength_m
        P = sinkhorn(1 - cos(k_i, prototype_m), mass) over the block's tokens i
        (K, V, strength)_m <- decay^S (1 - rate P_m) (K, V, strength)_m + rate sum_i decay^{S-i} P_im (k_i, v_i, 1)

    with P_m = sum_i P_im at most 1. A token's write is seen from the next block on, so any split of a sequence gives
    the same reads.

    Args:
        q, k: [B, H, T, dk]; q is to have unit length and be divided by the temperature. v: [B, H, T, dv].
        prototypes: [H, M, dk], the slots' learned addresses.
        state: from `empty_transport` or an earlier call.
        mass: [B, T] in [0, 1], how much of a token is written. mask: [B, T], 0 for pads, wherever they are.
        rate, decay: in (0, 1]. top_k: in 1..M; logits equal to the k-th largest all stay.
        epsilon: entropic regularisation, at least 0.03 (cosines span 2, and exp(-2 / epsilon) must be a float32).
        iterations: of Sinkhorn.

    Returns:
        The reads in v's dtype, and the state in float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape or an option does not fit.
    """
    _check(q, k, v, prototypes, state, mass, mask, rate, decay, top_k, epsilon, iterations)
    dtype = torch.promote_types(v.dtype, torch.float32)
    mask = torch.ones_like(mass, dtype=torch.bool) if mask is None else mask.bool()
    compute = reference if implementation == "reference" else transport_slots_chunked
    with torch.autocast(q.device.type, enabled=False):
        tokens = [x.to(dtype) for x in (q, k, v, prototypes)]
        slots = (*(x.to(dtype) for x in state[:-1]), state.position)
        out = compute(*tokens, slots, mass.to(dtype), mask, rate, decay, top_k, epsilon, iterations)
    read, peak, entropy, *slots = out
    entropy = entropy.detach() if return_entropy else None
    return SlotRead(read.to(v.dtype), peak.to(v.dtype), entropy), TransportState(*slots)


def _check(q, k, v, prototypes, state, mass, mask, rate, decay, top_k, epsilon, iterations) -> None:
    if q.ndim != 4 or v.ndim != 4 or q.shape[2] == 0:
        raise ValueError(f"transport_slots: q and v must be [B, H, T > 0, d], not {list(q.shape)} and {list(v.shape)}")
    B, H, T, dk = q.shape
    M, S, dv = state.strength.shape[-1], state.pending_mass.shape[-1], v.shape[-1]
    expected = {
        "k": (k, (B, H, T, dk)),
        "v": (v, (B, H, T, dv)),
        "prototypes": (prototypes, (H, M, dk)),
        "state.key": (state.key, (B, H, M, dk)),
        "state.value": (state.value, (B, H, M, dv)),
        "state.strength": (state.strength, (B, H, M)),
        "state.pending_key": (state.pending_key, (B, H, S, dk)),
        "state.pending_value": (state.pending_value, (B, H, S, dv)),
        "state.position": (state.position, (B,)),
        "mass": (mass, (B, T)),
        "mask": (mask, (B, T)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"transport_slots: {name} is {list(tensor.shape)}, expected {list(shape)}")
    if S > M:
        raise ValueError(f"transport_slots: a block of {S} tokens does not fit into {M} slots")
    for name, number in (("rate", rate), ("decay", decay)):
        if not 0 < number <= 1:
            raise ValueError(f"transport_slots: {name} must be in (0, 1], not {number}")
    if top_k is not None and not 1 <= top_k <= M:
        raise ValueError(f"transport_slots: top_k={top_k} must be between 1 and the {M} slots")
    if epsilon < 0.03 or iterations < 1:
        raise ValueError(f"transport_slots needs epsilon >= 0.03 and iterations >= 1, not {epsilon} and {iterations}")
