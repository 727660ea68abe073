"""One token a sequence through a whole read of a memory bank in one compiled pass, for decoding on the CPU.

W_o softmax(W_q h K' / sqrt(d)) V over the whole bank or over chapters that a router chose, h = x / rms(x) or x: the
read of `modeling.memory_bank` with a joint softmax and the router that sees the token. While decoding, calls cost more
than the arithmetic does.
"""

from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memzoo.kernels.one_token import MAX_BATCH
from memzoo.kernels.selective_scan.fused import is_available

__all__ = ["BankStep", "BankWeights"]

WIDTH = 16  # heads are as wide, or a multiple of it
PART = 256  # keys of a whole bank that a thread reads in one go, at most
_REAL = {torch.float32: np.float32, torch.float64: np.float64}


class BankWeights(NamedTuple):
    """E the memory's width; C chapters to choose from; N tokens in the bank, Hk heads of keys and values."""

    query: Tensor  # [E, D]
    gate: Tensor | None  # [C, D], None without chapters
    bias: Tensor | None  # [C]
    k: Tensor  # [Hk, N, d]
    v: Tensor  # [Hk, N, d]
    output: Tensor  # [D, E]


class BankStep:
    """Where the weights of a read lie, so that a token costs one call. They are read where they are: what changes them
    in place is seen.

    Args:
        num_chapters: of the bank, the first `num_shared` read by all; the gate chooses `top_k` of the others.
        normalize: weights sum to 1 over the chosen chapters, else over all.
        eps: of a norm of x without weights; None for none.
    """

    def __init__(
        self,
        weights: BankWeights,
        num_chapters: int = 1,
        num_shared: int = 0,
        top_k: int = 0,
        normalize: bool = True,
        eps: float | None = None,
    ) -> None:
        from memzoo.kernels.bank_step.loops import step  # numba is optional, and compiles when used
        from memzoo.kernels.regions import available

        (E, D), (heads, N, d), C = weights.query.shape, weights.k.shape, 0
        size = N // num_chapters
        if weights.gate is None:  # in parts that everyone reads
            size = gcd(N, PART)
            num_shared, top_k = N // size, 0
        else:
            C = len(weights.gate)
        self.weights, self.dtype, self.step, self.parallel = weights, weights.query.dtype, step, available
        places = [0 if weight is None else weight.data_ptr() for weight in weights]
        sizes = D, E, C, heads, N, d, size, num_shared, top_k, int(normalize)
        self.places, self.sizes, self.choices = np.array(places), sizes, C
        self.eps, self.scale = -1.0 if eps is None else eps, _REAL[self.dtype](d**-0.5)

    @staticmethod
    def fits(weights: BankWeights) -> bool:
        """Whether there is a compiled step: weights on the CPU, one precision, heads of whole vectors, numba."""
        kind, given = weights.query.dtype, [weight for weight in weights if weight is not None]
        if kind not in _REAL or weights.k.shape[-1] % WIDTH or not is_available():
            return False
        return all(x.dtype == kind and x.device.type == "cpu" and x.is_contiguous() for x in given)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """x [B, 1, D] -> y [B, 1, D] and, with a gate, the router's logits [B, 1, C].

        None for what is not one token of up to MAX_BATCH sequences, or is under autocast or has a gradient.
        """
        B, T = x.shape[:2]
        if T != 1 or B > MAX_BATCH or x.dtype != self.dtype or not x.is_contiguous() or x.device.type != "cpu":
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        y = torch.empty_like(x)
        logits = y if self.choices == 0 else x.new_empty(B, 1, self.choices)
        threads, places = (
            torch.get_num_threads() if self.parallel else 1,
            (x.data_ptr(), y.data_ptr(), logits.data_ptr()),
        )
        self.step(self.places, self.sizes, *places, B, threads, self.eps, self.scale)
        return y, None if self.choices == 0 else logits
