"""memory_gru: the sequential cell of MARU, a GRU with K memory banks (equations in reference.py).

`implementation="auto"` takes the compiled CPU loop (fused.py) where numba is installed and the tensors are on the CPU,
and the plain torch loop everywhere else. Both are the same function.
"""

from typing import Literal

import torch
from torch import Tensor

from memzoo.kernels.memory_gru.reference import MemoryGRUWeights, memory_gru_reference
from memzoo.kernels.selective_scan.fused import is_available as has_numba

__all__ = ["MemoryGRUWeights", "memory_gru"]


def memory_gru(
    x_router: Tensor,
    x_query: Tensor,
    x_gates: Tensor,
    h0: Tensor,
    M0: Tensor,
    weights: MemoryGRUWeights,
    *,
    router_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    shared_bank: bool = False,
    decay: float = 1.0,
    slot_norm_cap: float | None = None,
    return_writes: bool = False,
    implementation: Literal["auto", "reference", "fused"] = "auto",
) -> tuple:
    """Run the cell over a sequence and return (h_seq, router_logits, (h_T, M_T)), plus writes if asked.

    Inputs: x_router [B, T, R], x_query [B, T, m + 1] (query, strength), x_gates [B, T, 3H] (reset, update, candidate),
    the projections of the inputs, biases included. State: h0 [B, H], M0 [B, K, S, m]. router_bias [Kr] or [B, T, Kr]
    is added to the logits before the temperature (balancing, Gumbel noise). mask [B, T]: 0 leaves the state untouched
    bit for bit. top_k keeps that many routed banks; shared_bank makes bank 0 always on (then Kr = K - 1).

    Outputs: h_seq [B, T, H] in x_gates' dtype; router_logits [B, T, Kr] raw, 0 at masked steps; the state; writes
    [B, T, K, S], w of every slot, detached. All but h_seq are float32, or float64 if any input is float64; half
    precision inputs are computed in float32. Gradients reach every tensor except mask; the fused path has no double
    backward. Raises ValueError for a wrong shape or option.
    """
    _check(x_router, x_query, x_gates, h0, M0, weights, router_bias, mask, temperature, top_k, shared_bank, decay)
    if slot_norm_cap is not None and not slot_norm_cap > 0:
        raise ValueError(f"slot_norm_cap is {slot_norm_cap}, expected a positive number or None")
    on_cpu = x_gates.device.type == "cpu"
    if implementation == "fused" and not (on_cpu and has_numba()):
        raise RuntimeError(
            "implementation='fused' needs CPU tensors and numba (`pip install memzoo[numba]`); "
            f"given {x_gates.device.type} tensors, numba {'found' if has_numba() else 'missing'}"
        )

    tensors = [x_router, x_query, x_gates, h0, M0, *weights] + [x for x in (router_bias,) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    tensors = [x if x.dtype == dtype else x.to(dtype) for x in tensors]  # while decoding even a no-op .to counts
    inputs, weights, router_bias = tensors[:5], MemoryGRUWeights(*tensors[5:13]), (tensors[13:] or [None])[0]
    arguments = (
        *inputs,
        weights,
        router_bias,
        mask,
        float(temperature),
        top_k,
        shared_bank,
        float(decay),
        slot_norm_cap,
    )
    if implementation == "fused" or (implementation == "auto" and on_cpu and has_numba()):
        from memzoo.kernels.memory_gru.fused import memory_gru_fused  # numba is optional, and compiles when used

        h_seq, logits, h, M, writes = memory_gru_fused(*arguments, return_writes)
    else:
        with torch.autocast(x_gates.device.type, enabled=False):
            h_seq, logits, h, M, writes = memory_gru_reference(*arguments)
    h_seq = h_seq.to(x_gates.dtype)
    return (h_seq, logits, (h, M), writes.detach()) if return_writes else (h_seq, logits, (h, M))


def _check(x_router, x_query, x_gates, h0, M0, weights, router_bias, mask, temperature, top_k, shared_bank, decay):
    """Compare every shape with what x_gates, M0 and h0 say; the error names argument, given and expected."""
    if x_gates.dim() != 3 or x_gates.shape[1] == 0:
        raise ValueError(f"x_gates has shape {tuple(x_gates.shape)}, expected [B, T, 3H] with T >= 1")
    if h0.dim() != 2 or M0.dim() != 4:
        raise ValueError(f"h0, M0 have shapes {tuple(h0.shape)}, {tuple(M0.shape)}, expected [B, H], [B, K, S, m]")
    (B, T, _), H, (_, K, S, m) = x_gates.shape, h0.shape[1], M0.shape
    R, Kr = x_router.shape[-1], K - bool(shared_bank)
    expected = {
        "x_router": (x_router, (B, T, R)),
        "x_query": (x_query, (B, T, m + 1)),
        "x_gates": (x_gates, (B, T, 3 * H)),
        "h0": (h0, (B, H)),
        "M0": (M0, (B, K, S, m)),
        "mask": (mask, (B, T)),
        "router_bias": (router_bias, (Kr,) if router_bias is None or router_bias.dim() == 1 else (B, T, Kr)),
        "weights.router_h": (weights.router_h, (R, H)),
        "weights.router_out": (weights.router_out, (Kr, R)),
        "weights.router_out_bias": (weights.router_out_bias, (Kr,)),
        "weights.query_h": (weights.query_h, (m + 1, H)),
        "weights.gates_c": (weights.gates_c, (3 * H, m)),
        "weights.gates_h": (weights.gates_h, (3 * H, H)),
        "weights.write": (weights.write, (3 * m + 2, H)),
        "weights.write_bias": (weights.write_bias, (3 * m + 2,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if Kr < 1:
        raise ValueError(f"M0 has {K} bank(s), expected at least 2 with shared_bank=True")
    if top_k is not None and not 1 <= top_k <= Kr:
        raise ValueError(f"top_k is {top_k}, expected 1 to {Kr} (the routed banks) or None")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}, expected a number in (0, 1]")
