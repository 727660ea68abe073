"""The slot memory for all tokens at once: O(T (M + C)) by chunks of C queries.

Slots are a queue, so a token sees the last M written ones: with E = [the state's M slots, the tokens written here],
in order, a token before which c were written sees E[c : c + M]. EMA writes mix entry j with entry j - M, which is the
slot that it replaces: a linear recurrence along the first axis of E seen as [n, M]. Decay adds (t - i) log(decay) to
the logits; t log(decay) is common to a row of the softmax, so entry i carries -i log(decay).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.linear_scan import linear_scan
from memzoo.kernels.slot_memory.attention import CHUNK, slot_attention
from memzoo.kernels.slot_memory.step import unit


def slot_memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    strength: Tensor,
    write: Tensor | None,
    mask: Tensor | None,
    written_strength: Tensor | None,
    rate: float = 1.0,
    decay: float = 1.0,
    top_k: int | None = None,
    entropy: bool = False,
    attention=slot_attention,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the public op, for float32 and float64; returns the read, peak, entropy, and the state's three tensors.

    `write` must lie within `mask`; without either every token is real and written.
    """
    B, H, T, _ = q.shape
    M, C = key.shape[2], min(T, CHUNK)
    n = -(-T // C)
    places = torch.arange(T, device=q.device).expand(B, T)
    time = places if mask is None else mask.cumsum(1) - mask.long()  # [B, T]
    bias = q.new_zeros(B, T, dtype=torch.float64) if written_strength is None else written_strength.double()
    if decay != 1.0:
        bias = bias - time.double() * math.log(decay)
    fresh = _on_cpu(q) and bool(strength.isneginf().all())
    before, written = places, None  # [B, T] writes before each token, [B] in all
    if write is not None:
        before, written = write.cumsum(1) - write.long(), write.sum(1)
        order = _written_first(write, written)
        k, v, bias = _rows(k, order), _rows(v, order), bias.gather(1, order)
    k = unit(k)
    if averaged := rate != 1.0 and not (fresh and k.shape[2] <= M):  # into empty slots they are copied
        k, v = _averages(key, value, k, v, strength, rate)
    # E, with room after the end for the last windows
    room = C + n * C - T
    keys, values = (torch.cat([x, y, x.new_zeros(B, H, room, x.shape[3])], 2) for x, y in ((key, k), (value, v)))
    bias = torch.cat([strength.double(), bias], 1)  # [B, M + N]
    new_state = _last_slots(keys, values, bias[:, None, :, None], k.shape[2], M, written)
    new_state[2] = new_state[2][:, 0, :, 0]
    keys = unit(keys) if averaged else keys
    if decay != 1.0:
        elapsed = T if mask is None else mask.sum(1, keepdim=True).double()
        new_state[2] = new_state[2] + elapsed * math.log(decay)
    bias = F.pad(bias, (0, room), value=-math.inf)
    if n * C > T:  # queries that nobody asked; a chunk's offsets may not run ahead, so they repeat the last
        q = F.pad(q, (0, 0, 0, n * C - T))
        before = torch.cat([before, before[:, -1:].expand(B, n * C - T)], 1)
    base = time[:, ::C].double() * -math.log(decay)
    y, peak, spread = attention(
        q.reshape(B, H, n, C, -1), keys, values, bias, base, before.reshape(B, n, C), M, top_k or 0, entropy, fresh
    )
    reads = [x.flatten(2, 3) for x in (y, peak, spread)]
    if n * C > T:
        reads = [x[:, :, :T] for x in reads]
    if mask is not None:
        reads = [reads[0] * mask[:, None, :, None], *(x * mask[:, None] if x.numel() else x for x in reads[1:])]
    return *reads, *new_state[:2], new_state[2].to(strength.dtype)


def _on_cpu(x: Tensor) -> bool:
    """Where looking at a value costs nothing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _written_first(write: Tensor, written: Tensor) -> Tensor:
    """[B, N]: the tokens of each row that are written, in order, then others; N is the longest row's number."""
    N = write.shape[1]
    if _on_cpu(write):
        N = int(written.max())
    return (~write).to(torch.int8).argsort(dim=1, stable=True)[:, :N]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Entries [B, N] of x [B, H, E, d]."""
    B, H, E, d = x.shape
    start = torch.arange(B * H, device=x.device).view(B, H, 1) * E
    rows = (start + index[:, None]).flatten()
    return x.reshape(-1, d).index_select(0, rows).view(B, H, -1, d)


def _last_slots(keys: Tensor, values: Tensor, bias: Tensor, N: int, M: int, written: Tensor | None) -> list[Tensor]:
    """What the slots hold at the end: of each row's E the M entries after the first `written`, or N."""
    if written is None:
        return [x[:, :, N : N + M].clone() for x in (keys, values, bias)]  # a view would keep the sequence alive
    index = written[:, None] + torch.arange(M, device=keys.device)
    return [_rows(x, index) for x in (keys, values, bias)]


def _averages(key: Tensor, value: Tensor, k: Tensor, v: Tensor, strength: Tensor, rate: float) -> list[Tensor]:
    """EMA writes: entry j becomes (1 - rate) entry_{j-M} + rate new_j, a copy of new_j where entry j - M was empty."""
    B, H, M, _ = key.shape
    N = k.shape[2]
    steps = -(-N // M)
    if steps == 0:
        return [k, v]
    slots = torch.cat([key, value], 3)  # [B, H, M, dk + dv]
    new = F.pad(torch.cat([k, v], 3), (0, 0, 0, steps * M - N)).view(B, H, steps, M, -1).transpose(1, 2)
    keep = torch.full((B, steps, M), 1.0 - rate, dtype=k.dtype, device=k.device)
    keep[:, 0] = torch.where(strength.isneginf(), 0.0, keep[:, 0])
    keep = keep[:, :, None, :, None]  # [B, steps, 1, M, 1]
    b = ((1 - keep) * new).flatten(2)
    mixed, _ = linear_scan(keep.expand_as(new).reshape(b.shape), b, slots.flatten(1))
    mixed = mixed.view(new.shape).transpose(1, 2).flatten(2, 3)[:, :, :N]  # [B, H, N, dk + dv]
    return list(mixed.split([key.shape[3], value.shape[3]], 3))
