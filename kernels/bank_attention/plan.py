"""Which tokens read which keys: the pairs of a token and a chapter that it chose, sorted by chapter."""

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 1024  # pairs of one span: bounds what is gathered at once
TILE = 16  # pairs that are computed together in deterministic mode


class Span(NamedTuple):
    """Pairs `start` to `stop` of the plan read keys `first` to `last`."""

    first: int
    last: int
    start: int
    stop: int


class Plan(NamedTuple):
    token: Tensor  # [R]
    pair: Tensor  # [R] place in the n S slots; then n reads of the shared chapters, then one for padding
    spans: list[Span]
    tile: int | None


def make_plan(chapters: Tensor, bank_size: int, size: int, shared: int) -> Plan:
    """chapters [n, S], -1 for an unused slot; chapters have `size` keys; everyone reads the first `shared` keys.

    A matrix product may round a row differently when the number of rows changes, which other tokens' routing does.
    Under `torch.use_deterministic_algorithms` pairs are therefore computed by tiles of TILE, some of them padding:
    then what one token reads is the same to the last bit whatever the others do.
    """
    n, S = chapters.shape
    tile = TILE if torch.are_deterministic_algorithms_enabled() else None
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
    spans, start = [], 0
    for c, count in enumerate(blocks):
        for i in range(0, count, MOST):
            spans.append(Span(c * size, (c + 1) * size, start + i, start + min(i + MOST, count)))
        start += count
    if shared:
        pair = torch.cat([pair, torch.arange(n * S, n * S + n, device=key.device)])
        spans += [Span(0, shared, start + i, start + min(i + MOST, n)) for i in range(0, n, MOST)]
    token = torch.where(pair < n * S, pair // max(S, 1), pair - n * S).clamp_max(n - 1)
    return Plan(token, pair, spans, tile)


def pair_weights(log_weights: Tensor, shared: int) -> Tensor:
    """[n, S] -> one a pair: 0 for each read of the shared chapters, -inf for padding."""
    everyone = log_weights.new_zeros(log_weights.shape[0] if shared else 0)
    return torch.cat([log_weights.flatten(), everyone, log_weights.new_full((1,), -torch.inf)])
