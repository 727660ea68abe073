"""A network whose weights are a memory, learned while reading: the neural memory of Titans (arXiv 2501.00663).

`reference.py` is the definition, a loop over tokens with gradients from autograd. `fused.py` computes sequences on the
CPU where numba is installed, `chunked.py` everywhere else, `step.py` one token.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.neural_memory import fused
from memzoo.kernels.neural_memory.checks import check_inputs
from memzoo.kernels.neural_memory.chunked import neural_memory_chunked
from memzoo.kernels.neural_memory.layout import to_chunks, to_tokens
from memzoo.kernels.neural_memory.reference import neural_memory as reference
from memzoo.kernels.neural_memory.step import neural_memory_read, neural_memory_step
from memzoo.kernels.neural_memory.step_fused import neural_memory_step_fused

__all__ = ["MemoryState", "neural_memory", "neural_memory_read", "reference"]


class MemoryState(NamedTuple):
    """What continues a sequence: one matrix [B, H, out, in] a layer, in at least float32."""

    weights: list[Tensor]  # W_i, after the last token
    momentum: list[Tensor]  # S_i
    start: list[Tensor]  # W at the start of the current chunk, where gradients are taken
    position: Tensor  # [B] int64, tokens in the current chunk, below chunk_size


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor] | None,
    chunk_size: int,
    mask: Tensor | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    start: list[Tensor] | None = None,
    position: Tensor | None = None,
    activation: Literal["silu", "gelu"] = "silu",
    residual: bool = False,
    read_own_write: bool = True,
    detach_every: int | None = None,
    normalize: bool = False,
) -> tuple[Tensor, MemoryState]:
    """Titans (arXiv 2501.00663), eq. 8-14, with one gradient per token at the chunk's first weights (section 3.2).

    f_W(x) = W_n act(... act(W_1 x)) [+ x if residual];   g_i = gradient of 1/2 ||f_W(k_i) - v_i||^2 at W = start
    S_i = eta_i S_{i-1} - theta_i g_i;   W_i = (1 - alpha_i) W_{i-1} + S_i;   y_i = f_{W_i}(q_i)

    After every chunk_size real tokens of a row, start becomes W_i. chunk_size = 1 is the exact token-wise rule. One
    call, calls on its parts that pass the state on, and single-token calls give the same y and state.

    Args:
        q, k: [B, H, T, dk], v: [B, H, T, dv]; unit length of q and k keeps the memory stable: see normalize.
        alpha, eta, theta: decay in [0, 1], momentum in [0, 1], step >= 0, [B, H, T].
        weights: W before the first token, one [B, H, out, in] per layer, dk wide to dv wide; one is a linear memory.
        momentum: S, in the same shapes; zero when absent.
        mask: [B, T], 0 for pads, wherever they are: exact no-ops with y = 0.
        clip: largest norm of g_i over all matrices. threshold: smaller ||f(k) - v||^2 cause no step.
        start, position: of a state that this op returned; absent at the start of a sequence.
        residual: needs dk = dv. read_own_write: False reads with W_{i-1}.
        detach_every: every that many chunks of a call, gradients of the past stop.
        normalize: q and k are brought to unit length first.

    Returns:
        y [B, H, T, dv] in v's dtype, and the state in float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape, a layer's width, chunk_size or an option does not fit.
    """
    check_inputs(q, k, v, alpha, eta, theta, weights, momentum, chunk_size, mask, clip, threshold, start, position)
    if activation not in ("silu", "gelu"):
        raise ValueError(f"neural_memory: activation must be 'silu' or 'gelu', not {activation!r}")
    if residual and q.shape[-1] != v.shape[-1]:
        raise ValueError(f"neural_memory: residual needs dk = dv, not {q.shape[-1]} and {v.shape[-1]}")
    if detach_every is not None and detach_every < 1:
        raise ValueError(f"neural_memory: detach_every must be at least 1, not {detach_every}")
    B, H, T, _ = q.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    tokens, gates, W = _as(dtype, (q, k, v)), _as(dtype, (alpha, eta, theta)), _as(dtype, weights)
    S = [torch.zeros_like(x) for x in W] if momentum is None else _as(dtype, momentum)
    first = None if start is None else _as(dtype, start)
    if mask is not None:
        mask = mask.bool()
    options = (clip, threshold, activation, residual, read_own_write)
    if q.device.type == "cpu" and fused.is_available():
        if T > 1:
            rule = (*options, detach_every, normalize)
            y, *state = fused.neural_memory_fused(tokens, gates, W, S, first, chunk_size, mask, position, rule)
            position = _after(position, mask, B, T) % chunk_size
            return y.to(v.dtype), MemoryState(*state, position)
        if not torch.compiler.is_compiling() and not _with_grad(*tokens, *gates, *W, *S, *(first or [])):
            state, rule = (W, S, first or W), (*options, None, normalize)
            y, *after, filled, full = neural_memory_step_fused(
                [*tokens, *gates], *state, chunk_size, mask, position, rule
            )
            start = _refresh(state[2], after[0], filled == chunk_size) if full else state[2]
            return y.to(v.dtype), MemoryState(*after, start, filled % chunk_size if full else filled)
    with torch.autocast(q.device.type, enabled=False):
        first = W if first is None else first
        at = torch.zeros(B, dtype=torch.int64, device=q.device) if position is None else position
        after = _after(at, mask, B, T)
        if normalize:
            tokens[:2] = (F.normalize(x, dim=-1) for x in tokens[:2])
        gates[0] = 1 - gates[0]  # what is kept
        W, S, first = ([x.flatten(0, 1) for x in xs] for xs in (W, S, first))
        if T == 1:
            y, W, S = _step(tokens, gates, mask, W, S, first, options)
            state = [W, S, _refresh(first, W, after == chunk_size)]
        else:
            shift = None if mask is None and position is None else at
            y, state = _chunked(tokens, gates, W, S, first, chunk_size, mask, shift, after, options, detach_every)
        state = [[x.unflatten(0, (B, H)) for x in xs] for xs in state]
    return y.to(v.dtype), MemoryState(*state, after % chunk_size)


def _as(dtype: torch.dtype, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def _after(position: Tensor | None, mask: Tensor | None, B: int, T: int) -> Tensor:
    """Tokens since each row's first chunk began."""
    if mask is None:
        return torch.full((B,), T) if position is None else position + T
    real = mask.sum(1)
    return real if position is None else position + real


def _with_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _chunked(tokens, gates, W, S, first, chunk_size, mask, position, after, options, detach_every):
    B, H = tokens[0].shape[:2]
    slots = to_chunks([*tokens, *gates], chunk_size, mask, position)
    state = [torch.cat(x, 1) for x in zip(W, S)]
    save = _with_grad(*slots.tensors, *state, *first)
    *xs, keep, eta, theta = slots.tensors
    xs = (*xs, torch.stack([keep, eta]), theta, slots.mask)
    ends = after.repeat_interleave(H)
    y, state, first, _ = neural_memory_chunked(*xs, state, first, ends, *options, detach_every, save)
    W, S = zip(*(x.chunk(2, 1) for x in state))
    return to_tokens(y, slots, B, H), [W, S, first]


def _refresh(start: list[Tensor], weights: list[Tensor], full: Tensor) -> list[Tensor]:
    """The weights of the groups whose chunk is full, start for the others."""
    if full.device.type == "cpu" and not torch.compiler.is_compiling() and not full.any():
        return start  # most tokens: no copy
    if weights[0].ndim == 3:
        full = full.repeat_interleave(weights[0].shape[0] // full.shape[0])[:, None, None]
    else:
        full = full[:, None, None, None]
    return [torch.where(full, w, s) for w, s in zip(weights, start)]


def _step(tokens, gates, mask, W, S, first, options):
    B, H = tokens[0].shape[:2]
    real = tokens[0].new_ones(B, 1) if mask is None else mask.to(tokens[0].dtype)
    real = real.repeat_interleave(H, 0)[..., None]  # [G, 1, 1]
    keep, eta, theta = (x.reshape(-1, 1, 1) for x in gates)
    if mask is not None:
        keep, eta, theta = torch.where(real > 0, keep, 1.0), torch.where(real > 0, eta, 1.0), theta * real
    y, W, S = neural_memory_step(*(x.flatten(0, 1) for x in tokens), keep, eta, theta, real, W, S, first, *options)
    if mask is not None:
        y = torch.where(real > 0, y, 0.0)
    return y.unflatten(0, (B, H)), W, S
