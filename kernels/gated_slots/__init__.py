"""Banks of slots with gated writes: Gated Slot Attention (arXiv 2409.07146, eq. 7), K banks, a separate erase gate."""

from typing import Literal

import torch
from torch import Tensor

from memzoo.kernels.gated_slots import fused
from memzoo.kernels.gated_slots.chunked import CHUNK, gated_slots_chunked
from memzoo.kernels.gated_slots.reference import MAX_ERASE, MIN_DECAY, write_weights
from memzoo.kernels.gated_slots.reference import gated_slots as reference

__all__ = ["CHUNK", "MAX_ERASE", "MIN_DECAY", "gated_slots", "reference", "write_weights"]


def gated_slots(
    logits: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    initial_state: Tensor,
    decay: float = 1.0,
    mask: Tensor | None = None,
    implementation: Literal["auto", "reference", "chunked", "fused"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Read K banks of S slots, then write them, for every token.

    [alpha_t, omega_t] = softmax_S(logits_t);  y_t = sum_k router_tk sum_s alpha_tks M_{t-1,ks}
    w_t = router_t gate_t omega_t
    M_t = decay (1 - MAX_ERASE w_t erase_t) M_{t-1} + w_t value_t'

    Addresses do not depend on M, so each slot is a linear recurrence. "chunked" computes it chunk by chunk with matrix
    products, as gated linear attention (arXiv 2312.06635, section 4) with the slots as its key dimension; "fused", on
    the CPU where numba is installed, token by token in cache; "reference" is the plain loop.

    Args:
        logits: [B, T, 2, K, S], of the addresses to read and to write.
        router: [B, T, K], weights of the banks. write_gate, erase: [B, T] in [0, 1].
        value: [B, T, m].
        initial_state: M_0 [B, K, S, m].
        decay: in [MIN_DECAY, 1], what every slot keeps per token.
        mask: [B, T], 0 for pads, which leave M exactly as it was.

    Returns:
        y [B, T, m] in value's dtype and the final state [B, K, S, m] in at least float32.

    Raises:
        ValueError: a shape or the decay does not fit.
    """
    B, T, _, K, S = logits.shape
    m = value.shape[-1]
    expected = {
        "logits": (logits, (B, T, 2, K, S)),
        "router": (router, (B, T, K)),
        "write_gate": (write_gate, (B, T)),
        "erase": (erase, (B, T)),
        "value": (value, (B, T, m)),
        "initial_state": (initial_state, (B, K, S, m)),
        **({} if mask is None else {"mask": (mask, (B, T))}),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"gated_slots: {name} is {list(tensor.shape)}, expected {list(shape)}")
    if T == 0 or not MIN_DECAY <= decay <= 1.0:
        raise ValueError(f"gated_slots needs T > 0 and {MIN_DECAY} <= decay <= 1, not T={T}, decay={decay}")
    dtype = torch.promote_types(value.dtype, torch.float32)
    inputs = [x.to(dtype) for x in (logits, router, write_gate, erase, value, initial_state)]
    mask = None if mask is None else mask.bool()
    if implementation == "auto":
        on_cpu = value.device.type == "cpu" and fused.is_available()
        implementation = "reference" if T == 1 else "fused" if on_cpu else "chunked"
    if implementation == "fused":
        y, state = fused.gated_slots_fused(*inputs, decay=decay, mask=mask)
    elif implementation == "chunked":
        y, state = gated_slots_chunked(*inputs, decay, None if mask is None else mask.to(dtype))
    else:
        y, state = reference(*inputs, decay=decay, mask=mask)
    return y.to(value.dtype), state
