"""Cutting rows into segments that count each row's own real tokens.

A batch may be ragged: rows have read different numbers of tokens, so that their segments end at different places of
the input. Piece i of the cut holds, left-aligned, what every row has in its i-th segment from here on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Segments:
    """The cut of T tokens into pieces of at most `size`.

    Args:
        place: [B] int64, each row's tokens in its unfinished segment, below size.
        mask: [B, T], each row's real tokens first; None when all are real.

    Attributes:
        places: [B, T] each token's place in its segment.
        masks: [B, L] a piece, or None where all of it is real.
        full: [B] bool a piece, the rows whose segment it completes; None for all of them.
        completes: a piece, False when it can complete no row's segment.
        place: [B] int64, the tokens in the unfinished segment after the last token.
        past: the tokens of the longest unfinished segment before the input.
        missing: [B] int64, how many fewer a row's has; None where all are as long.
        together: whether all rows' segments begin and end at the same tokens of the input.
    """

    def __init__(self, place: Tensor, T: int, mask: Tensor | None, size: int) -> None:
        B, device = place.shape[0], place.device
        t = torch.arange(T, device=device)
        self.size, self.before = size, place
        self.tokens = place.new_full((B,), T) if mask is None else mask.sum(1)
        self.end = place + self.tokens
        self.place, self.places = self.end % size, (place[:, None] + t) % size
        # an exported program may not depend on a tensor's numbers: it takes the widest bounds
        low, high = (0, size - 1) if torch.compiler.is_exporting() else (int(x) for x in place.aminmax())
        self.past, pieces = high, -(-(high + T) // size)
        self.missing = None if low == high else high - place
        if low == high or pieces == 1:  # the pieces are slices
            self.lengths = [min((i + 1) * size - high, T) - max(i * size - high, 0) for i in range(pieces)]
            self.index, split = None, None if mask is None else mask.split(self.lengths, 1)
            self.masks: list[Tensor | None] = [None] * pieces if split is None else list(split)
        else:
            starts = [(i * size - place).clamp_min(0) for i in range(pieces)]  # [B] in the input
            self.lengths = [min(size - low, T), *(min(size, T - i * size + high) for i in range(1, pieces))]
            index = [start[:, None] + torch.arange(n, device=device) for start, n in zip(starts, self.lengths)]
            ends = [torch.minimum((i + 1) * size - place, self.tokens) for i in range(pieces)]
            self.masks = [x < end[:, None] for x, end in zip(index, ends)]
            self.index = torch.cat(index, 1).clamp_max(T - 1)
            offset = torch.tensor([0, *self.lengths], device=device).cumsum(0)
            at = torch.div(place[:, None] + t, size, rounding_mode="floor")  # [B, T] piece of each token
            self.inverse = offset[at] + t - torch.stack(starts, 1).gather(1, at)
        self.together = mask is None and low == high
        self.completes = [(i + 1) * size <= high + T for i in range(pieces)]
        ends = [(i + 1) * size <= self.end for i in range(pieces)]
        self.full = [None if self.together and done else x for done, x in zip(self.completes, ends)]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, T, ...] -> one [B, L, ...] a piece."""
        return (x if self.index is None else _gather(x, self.index)).split(self.lengths, 1)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        x = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]
        return x if self.index is None else _gather(x, self.inverse)

    def choose(self, i: int, new: Tensor, old: Tensor) -> Tensor:
        """`new` [B, ...] for the rows whose segment ends with piece i, `old` for the others."""
        full = self.full[i]
        return new if full is None else torch.where(full.view(-1, *(1,) * (new.ndim - 1)), new, old)

    def earlier(self, x: Tensor) -> Tensor:
        """What `unfinished` returned before this input -> [B, past, ...], aligned to the right."""
        if self.missing is None:
            return x[:, : self.past]
        index = torch.arange(self.past, device=x.device) - self.missing[:, None]
        return _gather(x, index.clamp_min(0))

    def unfinished(self, old: Tensor | None, pieces: Sequence[Tensor]) -> Tensor:
        """What belongs to the unfinished segment: [B, size - 1, ...] by place, zero beyond.

        Args:
            old: the same before this input, None for nothing.
            pieces: [B, L, ...] of the input's tokens, cut as by `split`.
        """
        if self.together:
            new, before = pieces[-1], sum(self.lengths[:-1])
        else:
            new, before = self.join(pieces), 0
        j = torch.arange(self.size - 1, device=new.device)
        index = j + (self.tokens - self.place - before)[:, None]  # [B, size - 1] in `new`; negative: read before
        if old is not None:
            new = torch.cat([old.to(new.dtype), new], 1)
            index = torch.where(index >= 0, index + self.size - 1, j)
        real = j < self.place[:, None]
        x = _gather(new, torch.where(real, index, 0))
        return torch.where(real.view(*real.shape, *(1,) * (x.ndim - 2)), x, 0)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, ...], index [B, L] -> [B, L, ...]."""
    return x.gather(1, index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
