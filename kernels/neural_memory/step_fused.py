"""One token of the neural memory in one compiled call. While decoding, calls cost more than the arithmetic does."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memzoo.kernels.neural_memory.arguments import (
    NO_MASK,
    in_rows,
    matrix_places,
    rule,
    token_places,
    whole,
)
from memzoo.kernels.threads import REGION_WORK


def neural_memory_step_fused(
    tokens: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    start: list[Tensor],
    chunk_size: int,
    mask: Tensor | None,
    position: Tensor | None,
    options: tuple,
) -> tuple[Any, ...]:
    """`neural_memory_fused` of a single token, without autograd; tokens with the gates, q, k, v, alpha, eta, theta.

    Returns y, weights, momentum, the tokens in each row's chunk, and how many rows' chunks are now full."""
    from memzoo.kernels.neural_memory.step_loops import step_all  # numba is optional, and compiles when used
    from memzoo.kernels.regions import available

    q, v = tokens[0], tokens[2]
    B, H = q.shape[:2]
    y, after = v.new_empty(v.shape), torch.empty(B, dtype=torch.int64)
    given = [[*map(whole, xs)] for xs in (weights, momentum, start)]
    results = [[torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] for xs in (weights, momentum)]
    widths = (weights[0].shape[-1], *(x.shape[-2] for x in weights))
    work = B * H * sum(a * b for a, b in pairwise(widths))
    rows = [*map(in_rows, tokens[:3]), *tokens[3:], y]
    arguments = (
        token_places(rows), matrix_places(*given, *results), NO_MASK if mask is None else mask.contiguous().numpy(),
        (B, H), rule(q.dtype, widths, chunk_size, *options),
    )  # fmt: skip
    threads = torch.get_num_threads() if available and work > REGION_WORK else 1
    before = np.zeros(B, np.int64) if position is None else position.contiguous().numpy()
    return y, *results, after, step_all(threads, arguments, before, after.numpy())
