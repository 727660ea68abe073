"""A bank of key-value pairs, searched by content: top-k retrieval, eviction of what is used least.

Persistent associative storage beside a neural memory, as in memory networks (arXiv 1503.08895) and Memorizing
Transformers (arXiv 2203.08913), but of constant size and with gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.modeling.segments import Segments

SHARPNESS = 8.0  # first inverse temperature of the search: keys and queries are of unit length


class KeyValueMemory(nn.Module):
    """x [B, T, D] -> [B, T, D]: what the k pairs that are nearest to each token hold.

        q, k = unit(W_q x), unit(W_k x);   g = sigmoid(w_g x + b);   v = g W_v x
        y = W_o sum_m p_m v_m,   p = softmax over the k best of s q k_m, and a pair of score 0 that holds nothing

    A token's pair can be found from the next segment on. At the end of a segment the bank keeps, of its own pairs and
    the segment's, those with the largest usage: that of a new pair is its strength g, that of an old one `decay` times
    the sum of what it had and the p that tokens gave it. Usage carries no gradient.

    Its state is `bank.keys`, `bank.values` [B, capacity, r] and `bank.usage` [B, capacity], 0 where there is no pair;
    of the unfinished segment `fresh.keys`, `fresh.values` [B, segment_size - 1, r], `fresh.usage`
    [B, segment_size - 1] and `bank.place` [B] int64. Usage is in at least float32.

    Args:
        dim: width r of keys and values.
        capacity: pairs that the bank holds. top_k: those that a token reads.
        decay: what is left of a pair's usage after a segment.
        segment_size: tokens of a segment.
    """

    def __init__(self, hidden_size: int, dim: int, capacity: int, top_k: int, decay: float, segment_size: int) -> None:
        super().__init__()
        self.dim, self.capacity, self.top_k, self.decay, self.segment_size = dim, capacity, top_k, decay, segment_size
        self.qkv_proj = nn.Linear(hidden_size, 3 * dim, bias=False)
        self.strength_proj = nn.Linear(hidden_size, 1)
        self.sharpness = nn.Parameter(torch.empty(()))
        self.o_proj = nn.Linear(dim, hidden_size, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The sharpness; the projections are initialised as linear layers."""
        init.constant_(self.sharpness, SHARPNESS)

    def forward(
        self, x: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the output and the new state."""
        B, T, _ = x.shape
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)  # [B, T, r]
        g = self.strength_proj(x).sigmoid()  # [B, T, 1]
        q, k, v = F.normalize(q, dim=-1) * self.sharpness.to(q.dtype), F.normalize(k, dim=-1), g * v
        usage = g[..., 0].detach().to(torch.promote_types(g.dtype, torch.float32))
        bank = self._bank(state, k, usage)
        fresh = {name: state.get(f"fresh.{name}") for name in bank}
        new = {"keys": k, "values": v, "usage": usage}
        place = state["bank.place"] if state else x.new_zeros(B, dtype=torch.int64)
        cut = Segments(place, T, mask, self.segment_size)
        pieces = {name: cut.split(tensor) for name, tensor in new.items()}
        reads = []
        for i, q_i in enumerate(cut.split(q)):
            y, used = self._search(q_i, bank, cut.masks[i])
            reads.append(y)
            bank["usage"] = bank["usage"] + used
            if cut.completes[i]:
                candidates = {name: _real(pieces[name][i], cut.masks[i]) for name in bank}
                if i == 0 and cut.past:
                    candidates = {name: torch.cat([fresh[name].to(c.dtype), c], 1) for name, c in candidates.items()}
                kept = self._keep(bank, candidates)
                bank = {name: cut.choose(i, kept[name], bank[name]) for name in bank}
        new_state = {f"bank.{name}": tensor for name, tensor in bank.items()}
        new_state |= {f"fresh.{name}": cut.unfinished(fresh[name], pieces[name]) for name in bank}
        return self.o_proj(cut.join(reads)), {**new_state, "bank.place": cut.place}

    def _bank(self, state: dict[str, Tensor], k: Tensor, usage: Tensor) -> dict[str, Tensor]:
        if state:
            return {name: state[f"bank.{name}"] for name in ("keys", "values", "usage")}
        empty = k.new_zeros(k.shape[0], self.capacity, self.dim)
        return {"keys": empty, "values": empty, "usage": usage.new_zeros(k.shape[0], self.capacity)}

    def _search(self, q: Tensor, bank: dict[str, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """q [B, L, r] -> what is read [B, L, r], and the p that every pair got [B, capacity]."""
        scores = q @ bank["keys"].to(q.dtype).mT  # [B, L, capacity]
        scores = scores.masked_fill((bank["usage"] == 0)[:, None], -torch.inf)
        if self.top_k < self.capacity:
            least = scores.detach().topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        p = F.pad(scores, (1, 0)).softmax(-1)[..., 1:]
        used = p.detach().to(bank["usage"].dtype)
        return p @ bank["values"].to(p.dtype), _real(used, mask).sum(1)

    def _keep(self, bank: dict[str, Tensor], candidates: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pairs with the largest usage, the largest first. Those of pads have usage 0."""
        both = {name: torch.cat([bank[name], candidates[name].to(bank[name].dtype)], 1) for name in ("keys", "values")}
        usage = torch.cat([self.decay * bank["usage"], candidates["usage"]], 1)
        usage, index = usage.topk(self.capacity, dim=1)
        index = index[..., None].expand(-1, -1, self.dim)
        return {**{name: x.gather(1, index) for name, x in both.items()}, "usage": usage}


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, L, ...], zero at pads."""
    return x if mask is None else torch.where(mask.view(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)
