"""The products of bank attention: rows against the keys that they read, in tiles whose logits stay in the cache.

Between the products of a tile only element-wise passes touch its logits, which in a core's own cache cost next to
nothing. Nothing larger than a tile is formed, and no logit is kept for the backward.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memzoo.kernels.bank_attention.plan import Plan, Span, Stage

# place of a tile's rows among the parts of each tensor of rows, the keys that they read, these keys and their values
# [Hk, keys, d], and whether they are the first that the rows read
Tile = tuple[int, slice, Tensor, Tensor, bool]
Load = Callable[[int, int], tuple[Tensor, Tensor]]  # first, last -> keys [Hk, last - first, d] and values
LOGITS = 1 << 18  # of a tile
ROWS, KEYS = 128, 256  # of a tile at least, where there are as many: fewer make slow products


def slices(k: Tensor, v: Tensor) -> Load:
    """The bank's keys and values as they are."""
    return lambda first, last: (k[:, first:last], v[:, first:last])


class Reader:
    """Products over token-major rows [n, g, Hk, d], with g the query heads that share a key head.

    Logits are `scale` times the products. Offsets [pairs, g, Hk] are subtracted from them before exp; None for none.
    What `gather`, `read` and `backward` return is overwritten by the next stage.
    """

    def __init__(self, plan: Plan, kv_heads: int, load: Load, dtype: torch.dtype, scale: float) -> None:
        self.plan, self.kv_heads, self.load, self.dtype, self.scale = plan, kv_heads, load, dtype, scale
        self.spare: dict[str, Tensor] = {}
        self.nothing = torch.zeros(1, 1, 1, dtype=dtype, device=plan.token.device)

    def enter(self, x: Tensor) -> Tensor:
        """[n, H, ...] -> [n, g, Hk, ...]: neither gathering nor the products then need a copy."""
        return x.to(self.dtype).unflatten(1, (self.kv_heads, -1)).transpose(1, 2).contiguous()

    def leave(self, x: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return x.transpose(1, 2).flatten(1, 2)

    def gather(self, name: str, x: Tensor, stage: Stage) -> Tensor:
        """The stage's rows of x [n, ...], called `name`."""
        if stage.tokens is not None:
            return x[stage.tokens]
        out = self._room(name, (stage.stop - stage.start, *x.shape[1:]), x)
        return torch.index_select(x, 0, self.plan.token[stage.start : stage.stop], out=out)

    def add(self, to: Tensor, rows: Tensor, stage: Stage) -> None:
        """to[token] += rows; in two dimensions, which index_add_ does several times faster than in four."""
        if stage.tokens is not None:
            to[stage.tokens] += rows
        else:
            token = self.plan.token[stage.start : stage.stop]
            to.view(len(to), -1).index_add_(0, token, rows.view(len(rows), -1))

    def maxima(self, rows: Tensor, stage: Stage) -> Tensor:
        """The largest logit [pairs, g, Hk] of each row."""
        top = rows.new_full(rows.shape[:3], -torch.inf)
        sizes, tiles = self._tiles(stage, rows.shape[1])
        queries, tops = (self._parts(x, sizes) for x in (rows, top))
        for at, _, k, _, _ in tiles:
            torch.maximum(tops[at], self._logits(queries[at], k).amax(-1), out=tops[at])
        return top

    def read(self, rows: Tensor, stage: Stage, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """sum_i exp(l_i - offset) v_i [pairs, g, Hk, d] and sum_i exp(l_i - offset) over the keys of each row."""
        read, total = self._room("read", rows.shape, rows), rows.new_zeros(rows.shape[:3])
        sizes, tiles = self._tiles(stage, rows.shape[1])
        queries, reads, totals = (self._parts(x, sizes) for x in (rows, read, total))
        offsets = None if offset is None else self._parts(offset[..., None], sizes)
        for at, _, k, v, fresh in tiles:
            e = self._logits(queries[at], k)
            e = e.exp_() if offsets is None else e.sub_(offsets[at]).exp_()
            if fresh:
                torch.bmm(e, v, out=reads[at])
            else:
                reads[at].baddbmm_(e, v)
            totals[at].add_(e.sum(-1))
        return read, total

    def backward(
        self, rows: Tensor, grad: Tensor, stage: Stage, norm: Tensor, delta: Tensor, to: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of P = exp(l - norm) with dl = P (grad v' - delta): adds dk and dv to `to`, [Hk, N, d] each.

        Returns d rows and each row's sum of dl.
        """
        (dk, dv), scale = to, self.scale
        d_rows, along = self._room("d_rows", rows.shape, rows), torch.zeros_like(norm)
        sizes, tiles = self._tiles(stage, rows.shape[1])
        parts = (rows, grad, norm[..., None], delta[..., None], d_rows, along)
        queries, grads, norms, deltas, to_rows, sums = (self._parts(x, sizes) for x in parts)
        for at, keys, k, v, fresh in tiles:
            q, g = queries[at], grads[at]
            p = self._logits(q, k).sub_(norms[at]).exp_()
            dv[:, keys].baddbmm_(p.mT, g)
            dl = torch.bmm(g, v.mT).sub_(deltas[at]).mul_(p)
            sums[at].add_(dl.sum(-1))
            dk[:, keys].baddbmm_(dl.mT, q, alpha=scale)
            torch.baddbmm(to_rows[at], dl, k, beta=0.0 if fresh else 1.0, alpha=scale, out=to_rows[at])
        return d_rows, along

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.baddbmm(self.nothing, q, k.mT, beta=0, alpha=self.scale)

    def _tiles(self, stage: Stage, groups: int) -> tuple[list[int], Iterator[Tile]]:
        """Numbers of rows, which part the stage's, and the tiles of all parts."""
        cuts = []
        for first, last, start, stop in stage.spans:
            step = max(-(-ROWS // groups), LOGITS // (groups * self.kv_heads * (last - first)))
            if self.plan.tile is not None and stage.tokens is None:
                step = self.plan.tile
            cuts.append([min(step, stop - a) * groups for a in range(start, stop, step)])
        return [rows for cut in cuts for rows in cut], self._walk(stage.spans, cuts)

    def _walk(self, spans: list[Span], cuts: list[list[int]]) -> Iterator[Tile]:
        at = -1
        for (first, last, *_), cut in zip(spans, cuts):
            k, v = (x.to(self.dtype) for x in self.load(first, last))
            width = max(KEYS, LOGITS // (self.kv_heads * cut[0]))  # of equal tiles, whatever the last has
            for _ in cut:
                at += 1
                if width >= last - first:
                    yield at, slice(first, last), k, v, True
                    continue
                for i in range(0, last - first, width):
                    j = min(i + width, last - first)
                    yield at, slice(first + i, first + j), k[:, i:j], v[:, i:j], i == 0

    def _parts(self, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        """[pairs, g, Hk, ...] -> views [Hk, rows, ...]."""
        return x.flatten(0, 1).transpose(0, 1).split(sizes, 1)

    def _room(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory that is used again for the next tensor of this name: new memory costs as much as a product."""
        size = math.prod(shape)
        if name not in self.spare or self.spare[name].numel() < size:
            self.spare[name] = like.new_empty(size)
        return self.spare[name][:size].view(shape)
