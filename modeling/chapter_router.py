"""Routers that choose chapters of a memory bank for every token without looking ahead, and their losses.

A router sees one vector r_t per token: itself ("token"), the mean of its row up to and with it ("prefix"), the mean of
the block before its own ("block"), or the mean of the row's first tokens, the prompt ("prompt"). Tokens of the first
block and of the prompt have nothing to be routed by and are not routed. Pads are moved to the right of each row before
the layers, so a token's place is its index among the real ones.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import initialization as init

Routing = Literal["token", "prefix", "block", "prompt"]


class Choice(NamedTuple):
    """What the router decided; -1 and 0 in the slots of tokens that are not routed."""

    chapters: Tensor  # [B, T, k] int64, 0 <= c < C
    log_weights: Tensor  # [B, T, k]
    logits: Tensor  # [B, T, C], or [B, T, C1 + C2] with product keys; -inf where a token is a pad or not routed


class ChapterRouter(nn.Module):
    """x [B, T, D] -> the top k of C chapters and their weights, softmax(W_r r + b), renormalised over the chosen.

    With product keys (arXiv 1907.05242, section 3.1) chapter c = i C2 + j has the score a_i + b_j, so that C chapters
    cost C1 + C2 rows of W_r, and the top k are found among k k candidates.

    Its state is `router_sum` [B, D] and `router_count` [B] of what it pools in at least float32, and for "block" and
    "prompt" `router_query` [B, D], the last finished mean; for "prompt" also `prompt_lengths` [B].

    Args:
        num_chapters: C, those that are routed; top_k of them are read.
        block_size: of "block"; of "prompt" the tokens of a prompt, unless the call says otherwise.
        normalize: weights sum to 1 over the chosen chapters, else they are the probabilities.
    """

    def __init__(
        self,
        hidden_size: int,
        num_chapters: int,
        top_k: int,
        routing: Routing = "token",
        block_size: int = 128,
        normalize: bool = True,
        product_keys: bool = False,
    ) -> None:
        super().__init__()
        if routing not in get_args(Routing):
            raise ValueError(f"routing must be one of {get_args(Routing)}, not {routing!r}")
        if not 1 <= top_k <= num_chapters:
            raise ValueError(f"top_k_chapters {top_k} must be between 1 and the {num_chapters} routed chapters")
        if block_size < 1:
            raise ValueError(f"the router's block must be at least 1 token, not {block_size}")
        self.num_chapters, self.top_k, self.routing = num_chapters, top_k, routing
        self.block_size, self.normalize = block_size, normalize
        self.halves = product_sizes(num_chapters) if product_keys else (num_chapters,)
        self.gate = nn.Linear(hidden_size, sum(self.halves))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        init.normal_(self.gate.weight, std=std)
        init.zeros_(self.gate.bias)

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor],
        mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> tuple[Choice, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the choice and the new state.

        `prompt_lengths` [B], real tokens, given at the start of a sequence: of "prompt", in place of `block_size`.
        """
        r, routed, new_state = self._pool(x, state, mask, prompt_lengths)
        if mask is not None:
            routed = mask.bool() if routed is None else routed & mask.bool()
        logits = self.gate(r.to(self.gate.weight.dtype)).to(torch.promote_types(x.dtype, torch.float32))
        return self.decide(logits, routed), new_state

    def decide(self, logits: Tensor, routed: Tensor | None) -> Choice:
        """From the gate's logits; `routed` [B, T] bool, None for all."""
        chapters, scores = _best(logits, self.halves, self.top_k)
        log_weights = scores.log_softmax(-1) if self.normalize else scores - _log_total(logits, self.halves)
        if routed is not None:
            unrouted = ~routed[..., None]
            chapters, log_weights = chapters.masked_fill(unrouted, -1), log_weights.masked_fill(unrouted, 0.0)
            logits = logits.masked_fill(unrouted, -torch.inf)
        return Choice(chapters, log_weights, logits)

    def _pool(
        self, x: Tensor, state: dict[str, Tensor], mask: Tensor | None, prompt_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """r [B, T, D], which tokens are routed [B, T] (None: all), and the new state."""
        if self.routing == "token":
            return x, None, {}
        B, T, D = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        count = state["router_count"] if state else torch.zeros(B, dtype=torch.int64, device=x.device)
        total = state["router_sum"] if state else x.new_zeros(B, D, dtype=wide)
        place = count[:, None] + torch.arange(T, device=x.device)  # [B, T] index in the row, right for real tokens
        new_state = {"router_count": count + real.sum(1)}
        x = torch.where(real[..., None], x.to(wide), 0.0)
        if self.routing == "prefix":
            sums = total[:, None] + x.cumsum(1)
            return sums / (place + 1)[..., None], None, {"router_sum": sums[:, -1], **new_state}
        query = state["router_query"] if state else torch.zeros_like(total)
        if self.routing == "prompt":
            length = torch.full_like(count, self.block_size) if prompt_lengths is None else prompt_lengths.to(count)
            length = state.get("prompt_lengths", length)
            inside = place < length[:, None]
            total = total + (x * inside[..., None]).sum(1)
            done = (new_state["router_count"] >= length)[:, None]
            query = torch.where(done, total / length.clamp_min(1)[:, None], query)
            new_state |= {"router_sum": total, "router_query": query, "prompt_lengths": length}
            return query[:, None].expand(-1, T, -1), ~inside, new_state
        return self._pool_blocks(x, real, place, total, query, new_state)

    def _pool_blocks(self, x, real, place, total, query, new_state) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The mean of the block before each token's own. The state holds the open block's sum."""
        B, T, D = x.shape
        block = place // self.block_size  # [B, T]
        first = block[:, :1]
        blocks = (T + self.block_size - 1) // self.block_size + 1
        local = block - first  # < blocks
        sums = torch.zeros(B, blocks, D, dtype=x.dtype, device=x.device)
        sums = sums.scatter_add(1, local[..., None].expand_as(x), x)
        sums = torch.cat([sums[:, :1] + total[:, None], sums[:, 1:]], 1)
        queries = torch.cat([query[:, None], sums / self.block_size], 1)  # [B, 1 + blocks, D], of local block i at i
        r = queries.gather(1, local[..., None].expand_as(x))
        now = (new_state["router_count"] // self.block_size)[:, None] - first  # [B, 1] open block after this call
        index = now[..., None].expand(-1, 1, D)
        new_state |= {"router_sum": sums.gather(1, index)[:, 0], "router_query": queries.gather(1, index)[:, 0]}
        return r, block > 0, new_state


def product_sizes(num_chapters: int) -> tuple[int, int]:
    """The two most even factors.

    Raises:
        ValueError: the number is prime.
    """
    small = next(i for i in range(int(num_chapters**0.5), 0, -1) if num_chapters % i == 0)
    if small == 1:
        raise ValueError(f"product keys need a number of routed chapters with two factors, not {num_chapters}")
    return small, num_chapters // small


def choose(logits: Tensor, halves: tuple[int, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """The top k chapters [..., k] and their log-probabilities among all."""
    chapters, scores = _best(logits, halves, top_k)
    return chapters, scores - _log_total(logits, halves)


def _best(logits: Tensor, halves: tuple[int, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """The top k chapters [..., k] and their scores."""
    if len(halves) == 1:
        scores, chapters = logits.topk(top_k, -1)
        return chapters, scores
    (a, i), (b, j) = (x.topk(min(top_k, x.shape[-1]), -1) for x in logits.split(halves, -1))
    scores, best = (a[..., :, None] + b[..., None, :]).flatten(-2).topk(top_k, -1)
    width = b.shape[-1]
    return i.gather(-1, best // width) * halves[1] + j.gather(-1, best % width), scores


def _log_total(logits: Tensor, halves: tuple[int, ...]) -> Tensor:
    """log sum_c exp(score of c) [..., 1]."""
    total = logits.split(halves, -1)[0].logsumexp(-1, keepdim=True)
    return total if len(halves) == 1 else total + logits[..., halves[0] :].logsumexp(-1, keepdim=True)


def router_losses(
    router_logits: tuple[Tensor, ...], halves: tuple[int, ...], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Load balance, variance and z losses, each a mean over the layers; tokens that were not routed do not count.

    L_lb = C sum_c f_c P_c (arXiv 2101.03961, eq. 4), f the share of the chosen slots, over all ranks while training,
    and P the mean probability: 1 when uniform. L_var = C sum_c (P_c - 1 / C)^2: 0 when uniform.
    L_z = mean logsumexp^2 (arXiv 2202.08906, eq. 5). With product keys each half is balanced by itself.
    """
    logits = torch.stack([x.flatten(0, -2) for x in router_logits])  # [L, n, C], all layers at once
    routed = logits[..., :1].isfinite()
    weight = routed.to(logits.dtype)
    count = weight.sum(1).clamp_min(1)  # [L, 1]
    logits = torch.where(routed, logits, 0.0)
    chapters, _ = _best(logits.detach(), halves, top_k)
    losses = []
    for part, chosen in zip(logits.split(halves, -1), (chapters,) if len(halves) == 1 else _halves(chapters, halves)):
        C, log_total = part.shape[-1], part.logsumexp(-1, keepdim=True)
        p = ((part - log_total).exp() * weight).sum(1) / count  # [L, C]
        slots = part.new_zeros(len(part), C).scatter_add(1, chosen.flatten(1), weight.expand(-1, -1, top_k).flatten(1))
        balance = C * (_share(slots) * p).sum(1)
        variance = C * (p - 1 / C).square().sum(1) * routed.any(1)[:, 0]
        z = (log_total.square() * weight).sum(1) / count
        losses.append(torch.stack([balance, variance, z[:, 0]]))
    balance, variance, z = torch.cat(losses, 1).mean(1)
    return balance, variance, z


def _halves(chapters: Tensor, halves: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return chapters // halves[1], chapters % halves[1]


def _share(slots: Tensor) -> Tensor:
    """Counts [L, C] as shares of their sum, over all processes while training."""
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        slots = slots.clone()
        torch.distributed.all_reduce(slots)
    return slots / slots.sum(1, keepdim=True).clamp_min(1)
