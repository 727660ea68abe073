"""Root mean square norm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * weight over the last dim.

torch has one kernel for it on CUDA and seven operators on the CPU, twenty more in the backward; there one compiled
pass each way takes their place, where numba is installed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels.rms_norm import fused

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., D], weight [D] or None. It is torch.nn.functional.rms_norm off the CPU and under torch.compile.

    Raises:
        ValueError: weight is not [D].
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {list(weight.shape)}, expected {list(x.shape[-1:])}")
    if torch.compiler.is_compiling() or not fused.fits(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return fused.rms_norm(x, weight, eps)
