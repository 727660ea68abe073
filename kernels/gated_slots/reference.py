"""The definition of gated slots: a plain loop over time."""

import torch
from torch import Tensor

MAX_ERASE = 0.99  # a slot keeps at least 1 % of itself per write, so that log-decays within a chunk stay finite
MIN_DECAY = 0.5


def write_weights(logits: Tensor, router: Tensor, write_gate: Tensor, mask: Tensor | None = None) -> Tensor:
    """w [B, T, K, S]: how strongly every token writes every slot."""
    w = (router * write_gate[..., None])[..., None] * logits[:, :, 1].softmax(-1)
    return w if mask is None else w * mask[..., None, None]


def gated_slots(
    logits: Tensor,
    router: Tensor,
    write_gate: Tensor,
    erase: Tensor,
    value: Tensor,
    initial_state: Tensor,
    decay: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the public op."""
    M, reads = initial_state, []
    alpha = router[..., None] * logits[:, :, 0].softmax(-1)  # [B, T, K, S]
    w = write_weights(logits, router, write_gate, mask)
    for t in range(value.shape[1]):
        reads.append(torch.einsum("bks,bksm->bm", alpha[:, t], M))
        keep = decay * (1 - MAX_ERASE * w[:, t] * erase[:, t, None, None])  # [B, K, S]
        if mask is not None:
            keep = torch.where(mask[:, t, None, None].bool(), keep, 1.0)
        M = keep[..., None] * M + w[:, t, ..., None] * value[:, t, None, None]
    return torch.stack(reads, dim=1), M
