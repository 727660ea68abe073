"""One token through a whole Mamba mixer (arXiv 2312.00752, figure 3) in one compiled pass, for decoding on the CPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memzoo.kernels import one_token


class MixerWeights(NamedTuple):
    """I channels, N states a channel, W taps, R the rank of delta's projection."""

    in_proj: Tensor  # [2I, D]
    in_bias: Tensor | None  # [2I]
    taps: Tensor  # [I, 1, W], as Conv1d has them
    taps_bias: Tensor  # [I]
    x_proj: Tensor  # [R + 2N, I]
    dt_proj: Tensor  # [I, R]
    dt_bias: Tensor  # [I]
    A_log: Tensor  # [I, N]
    D: Tensor  # [I]
    out_proj: Tensor  # [D, I]
    out_bias: Tensor | None  # [D]


def mixer_step(
    owner: Any, x: Tensor, weights: MixerWeights, tail: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """x [B, D], tail [B, I, W - 1], state [B, I, N] -> y [B, D], a new tail and a new state.

    None where the compiled step does not fit (`one_token.fits`); `owner` is the module that the weights belong to.
    """
    if not one_token.fits(x, tail, state):
        return None
    arrays = one_token.views(owner, list(weights), x.dtype)
    if arrays is None:
        return None
    from memzoo.kernels.selective_scan.mixer_kernel import step  # numba is optional, and compiles when used

    inputs = [v.contiguous() for v in (x, tail, state)]
    outputs = [torch.empty_like(v) for v in inputs]
    step(tuple(arrays), *(v.numpy() for v in inputs), *(v.numpy() for v in outputs))
    y, tail, state = outputs
    return y, tail, state
