"""Which tokens read which keys: the pairs of a token and a chapter that it chose, sorted by chapter."""

from typing import NamedTuple

import torch
from torch import Tensor

STAGE = 1 << 18  # numbers of gathered rows that are held at once
TILE = 16  # pairs that are computed together in deterministic mode


class Span(NamedTuple):
    """Pairs `start` to `stop` of the plan read keys `first` to `last`."""

    first: int
    last: int
    start: int
    stop: int


class Stage(NamedTuple):
    """Pairs `start` to `stop`, in spans; `tokens`: theirs, consecutive, when they read the shared chapters."""

    start: int
    stop: int
    spans: list[Span]
    tokens: slice | None = None


class Plan(NamedTuple):
    token: Tensor  # [R]
    pair: Tensor  # [R] place in the n S slots; then n reads of the shared chapters, then one for padding
    stages: list[Stage]
    tile: int | None


def make_plan(chapters: Tensor, bank_size: int, size: int, shared: int, width: int) -> Plan:
    """chapters [n, S], -1 for an unused slot; chapters have `size` keys; everyone reads the first `shared` keys.

    `width`: numbers of a token's row. A matrix product may round a row differently when the number of rows changes,
    which other tokens' routing does. Under `torch.use_deterministic_algorithms` pairs are therefore computed by tiles
    of TILE, some of them padding: then what one token reads is the same to the last bit whatever the others do.
    """
    n, S = chapters.shape
    tile = TILE if torch.are_deterministic_algorithms_enabled() else None
    most = max(STAGE // width, 1)
    most = most if tile is None else max(most // tile, 1) * tile
    C = bank_size // size
    key = torch.where(chapters < 0, C, chapters).flatten()
    order = key.argsort(stable=True)
    counts = key.bincount(minlength=C + 1)[:C]
    padded = counts if tile is None else (counts + tile - 1) // tile * tile
    used, blocks = torch.stack([counts, padded]).tolist()
    pair = order[: sum(used)]
    if tile is not None:
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # [C] how far each chapter's pairs move
        place = torch.arange(len(pair), device=key.device) + shift[key[pair]]
        pair = pair.new_full((sum(blocks),), n * S + (n if shared else 0)).index_put((place,), pair)
    stages = _stages(blocks, size, most)
    routed = len(pair)
    if shared:
        pair = torch.cat([pair, torch.arange(n * S, n * S + n, device=key.device)])
        for a in range(routed, routed + n, most):
            b = min(a + most, routed + n)
            stages.append(Stage(a, b, [Span(0, shared, a, b)], slice(a - routed, b - routed)))
    token = torch.where(pair < n * S, pair // max(S, 1), pair - n * S).clamp_max(n - 1)
    return Plan(token, pair, stages, tile)


def _stages(blocks: list[int], size: int, most: int) -> list[Stage]:
    """The chapters' pairs in stages of at most `most`; only a chapter of more is cut."""
    stages: list[Stage] = []
    spans: list[Span] = []
    start = 0
    for c, count in enumerate(blocks):
        for a in range(start, start + count, most):
            b = min(a + most, start + count)
            if spans and b - spans[0].start > most:
                stages.append(Stage(spans[0].start, a, spans))
                spans = []
            spans.append(Span(c * size, (c + 1) * size, a, b))
        start += count
    return stages + ([Stage(spans[0].start, start, spans)] if spans else [])


def pair_weights(log_weights: Tensor, shared: int) -> Tensor:
    """[n, S] -> one a pair: 0 for each read of the shared chapters, -inf for padding."""
    everyone = log_weights.new_zeros(log_weights.shape[0] if shared else 0)
    return torch.cat([log_weights.flatten(), everyone, log_weights.new_full((1,), -torch.inf)])
