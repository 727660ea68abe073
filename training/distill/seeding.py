"""Chapters of a bank from embedded passages: what retrieval would index, as a first guess for what a router chooses.

Passage c becomes routed chapter c: its n memory tokens are means of n equal pieces of the passage's hidden states at
the layer that reads the bank, and the layer's router chooses by the nearest mean: W_r[c] = s m_c,
b[c] = -s |m_c|^2 / 2, so that the logits are -s |r - m_c|^2 / 2 up to what all chapters share.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memzoo.kernels.rms_norm import rms_norm
from memzoo.modeling.memory_bank import MemoryBank, MemoryRead
from memzoo.modeling.statistics import record_calls
from memzoo.training.distill.study import split_windows


def cut_for_chapters(model: Any, document: Tensor) -> dict[int, list[Tensor]]:
    """A document [N] of token ids in C pieces of nearly equal length, for every number C of routed chapters.

    Raises:
        ValueError: no chapters, or too short a document for them.
    """
    counts = {read.router.num_chapters for read in _routed(model)}
    for count in counts:
        if len(document) < count:
            raise ValueError(
                f"a document of {len(document)} tokens cannot be cut into {count} passages, one a chapter"
            )
    return {count: list(document.tensor_split(count)) for count in counts}


@torch.no_grad()
def seed_chapters(
    model: Any,
    passages: list[Tensor],
    start: Tensor | None = None,
    sharpness: float = 8.0,
    context: int | None = None,
) -> None:
    """Write passages [N_c] of token ids into the routed chapters of every bank that has as many, one each.

    Memory tokens keep the mean size that the bank has. A bank that several layers read is written by the first of
    them; each layer's router is its own.

    Args:
        start: ids before each passage, not part of it.
        sharpness: mean difference between the logits of two passages' chapters at their means.
        context: tokens that the model reads at once, `start` included; longer passages are read in parts.

    Raises:
        ValueError: no chapters, as many passages as there are not, or a bank that cannot hold hidden states.
    """
    reads = _routed(model)
    counts = [read.router.num_chapters for read in reads]
    reads = [read for read in reads if read.router.num_chapters == len(passages)]
    if not reads:
        raise ValueError(f"{len(passages)} passages for {counts[0]} routed chapters: give one for each")
    before = start if start is not None else passages[0][:0]
    embedded: dict[nn.Module, list[Tensor]] = {read: [] for read in reads}
    banks: dict[nn.Module, MemoryBank] = {}
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    for passage in passages:
        parts = [passage] if context is None else split_windows(passage, context, len(before))
        with record_calls(reads) as calls:
            for part in parts:
                model(input_ids=torch.cat([before, part])[None].to(device), use_cache=False)
        for read in reads:
            hidden = [seen_by(read, args[0])[0, len(before) :] for args, _ in calls[read]]
            embedded[read].append(torch.cat(hidden).float())
            banks[read] = calls[read][0][0][1]
    model.train(mode)
    written: set[MemoryBank] = set()
    for read in reads:
        if banks[read] not in written:
            written.add(banks[read])
            _write(banks[read], read.num_shared, embedded[read])
        _route(read, embedded[read], sharpness)


def seen_by(read: MemoryRead, x: Tensor) -> Tensor:
    """What the projections and the router of a read see of its input."""
    return x if read.norm_eps is None else rms_norm(x, None, read.norm_eps)


def _routed(model: Any) -> list[MemoryRead]:
    """The reads of chapters.

    Raises:
        ValueError: there are none, a router has no row for each chapter, or a bank cannot hold hidden states.
    """
    reads = [module for module in model.modules() if isinstance(module, MemoryRead)]
    if not reads:
        raise ValueError(f"{type(model).__name__} has no memory bank")
    routed = [read for read in reads if read.router is not None]
    if not routed:
        raise ValueError("the bank has no chapters (num_chapters is 1), so nothing chooses between passages")
    if any(len(read.router.halves) > 1 for read in routed):
        raise ValueError("a router with product keys has no row of its own for each chapter; use one without")
    width = routed[0].router.gate.in_features
    for bank in model.modules():
        if not isinstance(bank, MemoryBank) or bank.num_chapters == 1:
            continue
        if bank.bank_type != "standard" or bank.quantized or bank.width != width:
            raise ValueError(
                f"hidden states of width {width} need a standard bank of that width in floating point, not {bank}"
            )
    return routed


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
