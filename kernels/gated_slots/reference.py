"""The definition of gated slots: a plain loop over time."""

import torch
from torch import Tensor

MAX_ERASE = 0.99  # a slot keeps at least 1 % of itself per write, so that log-decays within a chunk stay finite
MIN_DECAY = 0.5


def gated_slots(
    logits: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    initial_state: Tensor,
    decay: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the public op; also returns the writes w [B, T, K, S]."""
    M, reads = initial_state, []
    read, write = logits.softmax(-1).unbind(2)  # [B, T, K, S]
    alpha = router[..., None] * read
    w = (router * write_gate[..., None])[..., None] * write
    if mask is not None:
        w = w * mask[..., None, None]
    for t in range(value.shape[1]):
        reads.append(torch.einsum("bks,bksm->bm", alpha[:, t], M))
        keep = decay * (1 - MAX_ERASE * w[:, t] * erase[:, t, None, None])  # [B, K, S]
        if mask is not None:
            keep = torch.where(mask[:, t, None, None].bool(), keep, 1.0)
        M = keep[..., None] * M + w[:, t, ..., None] * value[:, t, None, None]
    return torch.stack(reads, dim=1), M, w
