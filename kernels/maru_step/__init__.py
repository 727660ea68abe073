"""One token through a whole block of MARU in one compiled pass, for decoding on the CPU.

y = x + Mixer(norm x);  y + W_o Cell(norm y), with the mixer of `selective_scan.mixer` and the cell of `memory_mingru`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memzoo.kernels import one_token
from memzoo.kernels.memory_mingru import MemoryMinGRUWeights
from memzoo.kernels.selective_scan.mixer import MixerWeights

__all__ = ["BlockState", "BlockWeights", "maru_step"]


class BlockWeights(NamedTuple):
    """D width, H cell, P the cell's projected input, in the parts of `memory_mingru.split_sizes`."""

    mixer_norm: Tensor  # [D]
    mixer: MixerWeights
    cell_norm: Tensor  # [D]
    x_proj: Tensor  # [P, D]
    x_bias: Tensor  # [P]
    cell: MemoryMinGRUWeights
    router_bias: Tensor  # [Kr], added to the logits
    out_proj: Tensor  # [D, H]


class BlockState(NamedTuple):
    conv: Tensor  # [B, I, W - 1]
    ssm: Tensor  # [B, I, N]
    h: Tensor  # [B, H]
    banks: Tensor  # [B, K, S, m]


def maru_step(
    owner: Any,
    x: Tensor,
    weights: BlockWeights,
    state: BlockState,
    eps: float,
    top_k: int | None = None,
    shared_bank: bool = False,
    decay: float = 1.0,
    slot_norm_cap: float | None = None,
) -> tuple[Tensor, BlockState] | None:
    """x [B, D] -> y [B, D] and the new state; the given one is not written to. `eps` is of both norms.

    None where the compiled step does not fit (`one_token.fits`); `owner` is the module that the weights belong to.
    """
    if not one_token.fits(x, *state):
        return None
    mixer, cell = weights.mixer, weights.cell
    parts = [weights.mixer_norm, weights.cell_norm, weights.x_proj, weights.x_bias, weights.out_proj]
    arrays = one_token.views(owner, [*mixer, *cell, weights.router_bias, *parts], x.dtype)
    if arrays is None:
        return None
    from memzoo.kernels.maru_step.loops import step  # numba is optional, and compiles when used

    inputs = [v.contiguous() for v in (x, *state)]
    outputs = [torch.empty_like(v) for v in inputs]
    n, rest = len(mixer), len(mixer) + len(cell) + 1
    options = (top_k or len(cell.router_out), int(shared_bank), float(decay), float(slot_norm_cap or 0.0))
    step(
        tuple(arrays[:n]), tuple(arrays[n:rest]), tuple(arrays[rest:]),
        tuple([v.numpy() for v in inputs]), tuple([v.numpy() for v in outputs]), eps, *options,
    )  # fmt: skip
    return outputs[0], BlockState(*outputs[1:])
