"""Chapters of a bank from embedded passages: what retrieval would index, as a first guess for what a router chooses.

Passage c becomes routed chapter c: its n memory tokens are means of n equal pieces of the passage's hidden states at
the layer that reads the bank, and the layer's router chooses by the nearest mean: W_r[c] = s m_c,
b[c] = -s |m_c|^2 / 2, so that the logits are -s |r - m_c|^2 / 2 up to what all chapters share.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memzoo.modeling.memory_bank import MemoryBank, MemoryRead
from memzoo.modeling.statistics import record_calls


@torch.no_grad()
def seed_chapters(model: Any, passages: list[Tensor], start: Tensor | None = None, sharpness: float = 8.0) -> None:
    """Write passages [N_c] of token ids into the routed chapters of every bank of the model, one each.

    Memory tokens keep the mean size that the bank has. A bank that several layers read is written by the first of
    them; each layer's router is its own.

    Args:
        start: ids before each passage, not part of it.
        sharpness: mean difference between the logits of two passages' chapters at their means.

    Raises:
        ValueError: no chapters, as many passages as there are not, or a bank that cannot hold hidden states.
    """
    reads = [module for module in model.modules() if isinstance(module, MemoryRead)]
    for read in reads:
        _check(read, len(passages))
    if not reads:
        raise ValueError(f"{type(model).__name__} has no memory bank")
    before = start if start is not None else passages[0][:0]
    embedded: dict[nn.Module, list[Tensor]] = {read: [] for read in reads}
    banks: dict[nn.Module, MemoryBank] = {}
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    with record_calls(reads) as calls:
        for passage in passages:
            model(input_ids=torch.cat([before, passage])[None].to(device), use_cache=False)
    model.train(mode)
    for read in reads:
        for args, _ in calls[read]:
            embedded[read].append(args[0][0, len(before) :].float())
        banks[read] = calls[read][0][0][1]
        if banks[read].bank_type != "standard" or banks[read].quantized or banks[read].width != args[0].shape[-1]:
            raise ValueError(
                f"hidden states of width {args[0].shape[-1]} need a standard bank of that width in floating point, "
                f"not {banks[read]}"
            )
    written: set[MemoryBank] = set()
    for read in reads:
        if banks[read] not in written:
            written.add(banks[read])
            _write(banks[read], read.num_shared, embedded[read])
        _route(read, embedded[read], sharpness)


def _check(read: MemoryRead, passages: int) -> None:
    if read.router is None:
        raise ValueError("the bank has no chapters (num_chapters is 1), so nothing chooses between passages")
    if read.router.num_chapters != passages:
        raise ValueError(f"{passages} passages for {read.router.num_chapters} routed chapters: give one for each")
    if len(read.router.halves) > 1:
        raise ValueError("a router with product keys has no row of its own for each chapter; use one without")


def _write(bank: MemoryBank, num_shared: int, passages: list[Tensor]) -> None:
    size = bank.num_memory_tokens // bank.num_chapters
    rows = torch.cat([F.adaptive_avg_pool1d(x.mT, size).mT for x in passages])
    first = num_shared * size
    rows = rows * (bank.weight[first:].float().square().mean() / rows.square().mean()).sqrt()
    bank.weight[first:] = rows.to(bank.weight.dtype)


def _route(read: MemoryRead, passages: list[Tensor], sharpness: float) -> None:
    gate = read.router.gate
    means = torch.stack([x.mean(0) for x in passages])
    # a shift of the origin changes no distance and keeps the logits, whose size has a loss, small
    centre = means.mean(0)
    apart = torch.pdist(means).square().mean() / 2 if len(means) > 1 else means.square().sum()
    scale = sharpness / apart.clamp_min(1e-12)
    means = means - centre
    gate.weight.copy_(scale * means)
    gate.bias.copy_(-scale * (means.square().sum(-1) / 2 + means @ centre))
