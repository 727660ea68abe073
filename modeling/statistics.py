"""What a memory does, in numbers: routing, use of slots, parameters by part."""

from collections import Counter

import torch
from torch import Tensor, nn


def router_statistics(probabilities: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Of bank probabilities [B, T, K]: the mean entropy (nats), and the mean load's variance, maximum and minimum."""
    weight = torch.ones_like(probabilities[..., 0]) if mask is None else mask.to(probabilities.dtype)
    count = weight.sum().clamp(min=1)
    entropy = -(probabilities * probabilities.clamp(min=1e-12).log()).sum(-1)
    load = (probabilities * weight[..., None]).sum((0, 1)) / count
    return {
        "router_entropy": ((entropy * weight).sum() / count).item(),
        "load_variance": load.var(correction=0).item(),
        "max_load": load.max().item(),
        "min_load": load.min().item(),
    }


def slot_statistics(writes: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Of write weights [B, T, K, S]: the mean total write of a token, and the share of slots that are in use.

    A slot is in use when it receives more than a tenth of its even share of all writes. `address_peak` is the mean
    share of a token's write that its strongest slot gets: 1 / (K S) when flat, 1 when one slot is chosen.
    """
    if mask is not None:
        writes = writes * mask[..., None, None].to(writes.dtype)
    per_token = writes.flatten(2)  # [B, T, K S]
    total = per_token.sum(-1)
    real = total > 0
    per_slot = per_token.sum((0, 1))
    return {
        "write_mass": total[real].mean().item() if real.any() else 0.0,
        "slots_in_use": (per_slot > 0.1 * per_slot.mean()).float().mean().item(),
        "address_peak": (per_token.amax(-1)[real] / total[real]).mean().item() if real.any() else 0.0,
    }


def parameter_breakdown(model: nn.Module, depth: int = 2) -> dict[str, int]:
    """Parameters by part, largest first: names are cut to `depth` levels and layer numbers are merged.

    Tied parameters count once, under their first name.
    """
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".")[:-1] if not part.isdigit() and part not in ("model", "layers")]
        counts[".".join(parts[:depth]) or name] += parameter.numel()
    return dict(counts.most_common())
