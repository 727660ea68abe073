"""The root mean square norm of the blocks: torch's module on the kernel that is fast on a CPU too."""

import torch
from torch import Tensor, nn

from memzoo.kernels.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's, over the last dim, with `eps` given."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def narrow(x: Tensor) -> Tensor:
    """x as autocast's products want it: once for all layers that read x, where autocast converts it for each."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
