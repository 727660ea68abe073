"""A tier of slots that tokens are written to and read from: a queue of the last M written tokens, read by attention.

`reference.py` is the definition. `chunked.py` computes sequences in O(T (M + C)), `step.py` one token, `triton.py` the
attention on a GPU. `memzoo.kernels.transport_slots` is another way to write: tokens
assigned to slots by optimal transport.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from memzoo.kernels.available import has_triton
from memzoo.kernels.slot_memory.chunked import slot_memory_chunked
from memzoo.kernels.slot_memory.reference import slot_memory as reference
from memzoo.kernels.slot_memory.step import slot_memory_step, slot_weights

__all__ = ["SlotRead", "SlotState", "empty_slots", "reference", "slot_memory", "slot_weights"]


class SlotState(NamedTuple):
    """M slots, oldest first: the first is the next to be written. In at least float32."""

    key: Tensor  # [B, H, M, dk]
    value: Tensor  # [B, H, M, dv]
    strength: Tensor  # [B, M], log; -inf: empty


class SlotRead(NamedTuple):
    value: Tensor  # [B, H, T, dv]
    peak: Tensor  # [B, H, T], the largest weight, 0 where there was nothing to read
    entropy: Tensor | None  # [B, H, T] of the weights, in nats; carries no gradient


def empty_slots(
    batch_size: int, num_heads: int, num_slots: int, key_dim: int, value_dim: int, dtype: torch.dtype, device
) -> SlotState:
    """The state before the first token."""
    options = {"dtype": dtype, "device": device}
    return SlotState(
        torch.zeros(batch_size, num_heads, num_slots, key_dim, **options),
        torch.zeros(batch_size, num_heads, num_slots, value_dim, **options),
        torch.full((batch_size, num_slots), -torch.inf, **options),
    )


def slot_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SlotState,
    write: Tensor | None = None,
    mask: Tensor | None = None,
    strength: Tensor | None = None,
    rate: float = 1.0,
    decay: float = 1.0,
    top_k: int | None = None,
    return_entropy: bool = False,
    implementation: Literal["auto", "reference", "chunked", "triton"] = "auto",
) -> tuple[SlotRead, SlotState]:
    """Read M slots, then write one of them, for every token.

        s_m = q_t K_m / |K_m| + log strength_m,  w = softmax of the top_k largest,  y_t = sum_m w_m V_m

    A token with write_t replaces the oldest slot, as it is when that was empty and else by an average,
    K <- (1 - rate) K + rate k_t / |k_t|, V likewise. Every token multiplies all strengths by decay.

    Args:
        q, k: [B, H, T, dk]; q is to have unit length and be divided by the temperature. v: [B, H, T, dv].
        state: from `empty_slots` or an earlier call; with rate 1 its keys have unit length.
        write: [B, T] bool, tokens to be written; None for all. mask: [B, T], 0 for pads, wherever they are: they
            write nothing, count as no time, and their reads are 0.
        strength: [B, T], the log strength that a written token begins with; 0 when absent.
        rate: in (0, 1]; 1 overwrites. decay: in (0, 1]. top_k: in 1..M; logits equal to the k-th largest all stay.

    Returns:
        The reads in v's dtype, and the state in float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape or an option does not fit.
    """
    _check(q, k, v, state, write, mask, strength, rate, decay, top_k)
    dtype = torch.promote_types(v.dtype, torch.float32)
    if mask is not None:
        mask = mask.bool()
        write = mask if write is None else write.bool() & mask
    elif write is not None:
        write = write.bool()
    with torch.autocast(q.device.type, enabled=False):
        tokens = [x.to(dtype) for x in (q, k, v)]
        slots = [x.to(dtype) for x in state]
        added = None if strength is None else strength.to(dtype)
        options = {"rate": rate, "decay": decay, "top_k": top_k}
        if implementation == "reference":
            ones = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
            added = ones.to(dtype) * 0 if added is None else added
            masks = (ones if write is None else write, ones if mask is None else mask)
            out = reference(*tokens, *slots, *masks, added, **options)
        elif implementation == "auto" and q.shape[2] == 1:
            out = slot_memory_step(*tokens, *slots, write, mask, added, **options, entropy=return_entropy)
        else:
            if implementation == "triton" or (implementation == "auto" and q.is_cuda and has_triton("slot_memory")):
                from memzoo.kernels.slot_memory.triton import triton_attention

                options["attention"] = triton_attention
            out = slot_memory_chunked(*tokens, *slots, write, mask, added, **options, entropy=return_entropy)
    read, peak, entropy, *slots = out
    return SlotRead(read.to(v.dtype), peak.to(v.dtype), entropy if return_entropy else None), SlotState(*slots)


def _check(q, k, v, state, write, mask, strength, rate, decay, top_k) -> None:
    if q.ndim != 4 or v.ndim != 4 or q.shape[2] == 0:
        raise ValueError(f"slot_memory: q and v must be [B, H, T > 0, d], not {list(q.shape)} and {list(v.shape)}")
    B, H, T, dk = q.shape
    M, dv = state.strength.shape[-1], v.shape[-1]
    expected = {
        "k": (k, (B, H, T, dk)),
        "v": (v, (B, H, T, dv)),
        "state.key": (state.key, (B, H, M, dk)),
        "state.value": (state.value, (B, H, M, dv)),
        "state.strength": (state.strength, (B, M)),
        "write": (write, (B, T)),
        "mask": (mask, (B, T)),
        "strength": (strength, (B, T)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"slot_memory: {name} is {list(tensor.shape)}, expected {list(shape)}")
    for name, number in (("rate", rate), ("decay", decay)):
        if not 0 < number <= 1:
            raise ValueError(f"slot_memory: {name} must be in (0, 1], not {number}")
    if top_k is not None and not 1 <= top_k <= M:
        raise ValueError(f"slot_memory: top_k={top_k} must be between 1 and the {M} slots")
