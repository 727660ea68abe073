"""What the compiled loops are called with: where the tensors are, and the call's options as numbers."""

import functools
from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

SEGMENT = 128  # tokens between the states that a forward keeps for its backward
NO_MASK = np.empty((0, 0), np.bool_)


def block_size(chunk: int) -> int:
    """Tokens that are read and written at once."""
    return 32 if chunk >= 32 else 16


def segment_chunks(chunk: int) -> int:
    return max(1, SEGMENT // chunk)


def places(tensors: Iterable[Tensor | None], axes: tuple[int, ...]) -> np.ndarray:
    """[tensors, 1 + axes]: the address of each, 0 for None, and its strides along these axes in numbers."""
    numbers: list[int] = []
    for x in tensors:
        if x is None:
            numbers += [0] * (1 + len(axes))
        else:
            strides = x.stride()
            numbers += [x.data_ptr(), *[strides[axis] for axis in axes]]
    return np.array(numbers, np.int64).reshape(-1, 1 + len(axes))


def token_places(tensors: Iterable[Tensor]) -> np.ndarray:
    """Of [B, H, T, ...]: strides over B, T and H."""
    return places(tensors, (0, 2, 1))


def matrix_places(*groups: Iterable[Tensor | None]) -> np.ndarray:
    """[groups, L, 3] of matrices [B, H, out, in], a group having one of every layer: strides over B and H."""
    return places(chain(*groups), (0, 1)).reshape(len(groups), -1, 3)


def in_rows(x: Tensor) -> Tensor:
    """[B, H, T, d] with contiguous d, as the loops take it."""
    return x if x.stride(3) == 1 else x.contiguous()


def whole(x: Tensor) -> Tensor:
    """[B, H, out, in] whose matrices are contiguous, wherever each of them is."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


@functools.cache
def rule(
    dtype: torch.dtype,
    widths: tuple[int, ...],
    chunk: int,
    clip: float | None,
    threshold: float | None,
    activation: str,
    residual: bool,
    own_write: bool,
    detach_every: int | None,
    normalize: bool,
):
    """The options as the loops take them."""
    from memzoo.kernels.neural_memory.buffers import Rule  # numba is optional, and compiles when used
    from memzoo.kernels.neural_memory.elements import KINDS
    from memzoo.kernels.tiles import PAD

    real, sizes = np.float32 if dtype == torch.float32 else np.float64, np.array(widths)
    pads = -(-sizes // PAD) * PAD
    padded = bool((pads != sizes).any()) or chunk % block_size(chunk) > 0
    return Rule(
        sizes, pads, padded, chunk, block_size(chunk), segment_chunks(chunk), KINDS[activation],
        real(clip or 0), real(threshold or 0), residual, own_write, detach_every or 0, normalize,
        real(np.finfo(real).tiny ** 0.4),
    )  # fmt: skip
