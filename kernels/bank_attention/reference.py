"""The definition of bank attention: a loop over tokens, each over its own keys."""

import torch
from torch import Tensor


def bank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor | None = None,
    log_weights: Tensor | None = None,
    num_chapters: int = 1,
    num_shared: int = 0,
    mixing: str = "joint",
    scale: float | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """As the public op."""
    B, T, H, dh = q.shape
    size = k.shape[1] // num_chapters
    scale = dh**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(H // k.shape[0], 0) for x in (k, v))  # a key head serves H / Hk query heads
    rows = []
    for b in range(B):
        for t in range(T):
            logits = (k @ q[b, t, :, :, None])[..., 0] * scale  # [H, N]
            if chapters is None:
                rows.append((logits.softmax(-1)[..., None] * v).sum(1))
                continue
            at = (t if chapters.shape[1] == T else 0) if groups is None else groups[b, t]
            parts = [(0, num_shared * size, torch.zeros((), dtype=q.dtype))] if num_shared else []
            for chapter, log_weight in zip(chapters[b, at].tolist(), log_weights[b, at]):
                if chapter >= 0:
                    parts.append((chapter * size, (chapter + 1) * size, log_weight))
            if not parts:
                rows.append(torch.zeros_like(v[:, 0]))
            elif mixing == "joint":
                biased = torch.cat([logits[:, i:j] + w for i, j, w in parts], 1).softmax(-1)
                rows.append((biased[..., None] * torch.cat([v[:, i:j] for i, j, _ in parts], 1)).sum(1))
            else:
                reads = [w.exp() * (logits[:, i:j].softmax(-1)[..., None] * v[:, i:j]).sum(1) for i, j, w in parts]
                rows.append(torch.stack(reads).sum(0))
    return torch.stack(rows).view(B, T, H, -1)
