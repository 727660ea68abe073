"""Two tiers of slots that a text writes while it is read: a fast one always, a deep one when it is surprising."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.kernels.linear_scan import linear_scan
from memzoo.kernels.selective_scan import causal_conv1d
from memzoo.kernels.slot_memory import SlotRead, SlotState, empty_slots, slot_memory, slot_weights
from memzoo.kernels.transport_slots import TransportState, empty_transport, transport_slots

INITIAL_MIX = 0.7  # of the fast tier's share, one half of which depends on the input
INITIAL_CONFIDENCE = 2.0  # before the sigmoid
VARIANCE_FLOOR = 1e-6


class DualTierRead(NamedTuple):
    """What `DualTierMemory.read` returns for one token of every sequence."""

    value: Tensor  # [B, D]
    fast: Tensor  # [B, H, d], of each tier before they are mixed
    deep: Tensor
    fast_weights: Tensor  # [B, H, M]
    deep_weights: Tensor
    entropy: Tensor  # [B, H] in nats, the mean of both tiers
    confidence: Tensor  # [B, H], the share of what was read in the value
    strength: Tensor  # [B, H], the largest weight of both tiers


class DualTierWrite(NamedTuple):
    """What `DualTierMemory.write` did, [B] each."""

    surprise: Tensor
    deep_write: Tensor  # bool
    key_norm: Tensor
    value_norm: Tensor


class DualTierMemory(nn.Module):
    """x [B, T, D] -> [B, T, D]: what a fast and a deep tier of M slots hold about x.

        q, k, v = W_q x, conv(W_k x), W_v x per head, q and k of unit length
        z_t = mean |h_t - mu_{t-1}| / sqrt(var_{t-1});  s_t = sigmoid(z_t - 1);  h = W_s x, mu and var running
        fast, deep: w = softmax(cos(q, K) / tau + log strength), o = w V (`memzoo.kernels.slot_memory`)
        lambda = (sigmoid(b) + sigmoid(w_g x)) / 2;  o = lambda o_fast + (1 - lambda) o_deep
        r = sigmoid(w_r x) max(max w_fast, max w_deep);  y = W_o (r o + (1 - r) v)

    A token is read before it is written. The fast tier takes every token in place of its oldest; the deep one only
    those with s above the threshold, or while it is not full, with log strength log sigmoid((s - threshold) / T_s):
    the decision is hard, and its soft form is what the gradient sees.

    The state: `fast_*` and `deep_*` (`SlotState`; `TransportState` with "sinkhorn"), `deep_free` [B] int64, slots not
    yet filled, `surprise_mean` and `surprise_var` [B, width], `key_conv` [B, width, conv_kernel - 1]. An empty dict is
    the start of a sequence.

    Args:
        memory_dim: width of keys and values, all heads together; None is hidden_size.
        query_proj: False takes queries from the projection of keys.
        conv_kernel: width of the causal convolution of the keys, None for none: with it, a key can hold what came
            before its value.
        temperature: the first tau of every head; it is learned.
        fast_rate, deep_rate: share of the new token in a slot that was not empty.
        decay: what every slot's strength keeps per token.
        top_k: slots that a head reads, None for all.
        surprise_threshold: of s. surprise_momentum: of mu and var. surprise_temperature: T_s.
        confidence: False leaves y = W_o o.
        assignment: slots of deep writes: "ring", the oldest, or "sinkhorn", by optimal transport of each block of
            `block_size` (None: half the slots) tokens, seen from the next block on (`memzoo.kernels.transport_slots`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 1,
        num_slots: int = 64,
        memory_dim: int | None = None,
        query_proj: bool = True,
        conv_kernel: int | None = 4,
        temperature: float = 0.1,
        fast_rate: float = 1.0,
        deep_rate: float = 0.5,
        decay: float = 1.0,
        top_k: int | None = None,
        surprise_threshold: float = 0.5,
        surprise_momentum: float = 0.1,
        surprise_temperature: float = 0.1,
        confidence: bool = True,
        assignment: Literal["ring", "sinkhorn"] = "ring",
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        width = hidden_size if memory_dim is None else memory_dim
        if width % num_heads:
            raise ValueError(f"the memory's width {width} is not a multiple of num_heads {num_heads}")
        if top_k is not None and not 1 <= top_k <= num_slots:
            raise ValueError(f"top_k {top_k} must be between 1 and num_slots {num_slots}")
        self.num_heads, self.num_slots, self.width = num_heads, num_slots, width
        self.fast_rate, self.deep_rate, self.decay, self.top_k = fast_rate, deep_rate, decay, top_k
        self.threshold, self.momentum, self.softness = surprise_threshold, surprise_momentum, surprise_temperature
        self.initial_temperature = temperature
        self.query_proj = nn.Linear(hidden_size, width, bias=False) if query_proj else None
        self.key_proj = nn.Linear(hidden_size, width, bias=False)
        self.value_proj = nn.Linear(hidden_size, width, bias=False)
        self.conv1d = None
        if conv_kernel is not None:
            self.conv1d = nn.Conv1d(width, width, conv_kernel, groups=width, bias=False)
        self.log_temperature = nn.Parameter(torch.empty(num_heads))
        self.surprise_proj = nn.Linear(hidden_size, width, bias=False)
        self.mix_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.mix_bias = nn.Parameter(torch.empty(num_heads))
        self.confidence_proj = nn.Linear(hidden_size, num_heads) if confidence else None
        self.out_proj = nn.Linear(width, hidden_size, bias=False)
        self.prototypes = None
        if assignment == "sinkhorn":
            self.block_size = max(1, num_slots // 2) if block_size is None else block_size
            if not 1 <= self.block_size <= num_slots:
                raise ValueError(f"block_size {block_size} must be between 1 and num_slots {num_slots}")
            self.prototypes = nn.Parameter(torch.empty(num_heads, num_slots, width // num_heads))
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """First values of what is not a linear layer, which `std` is for."""
        init.constant_(self.log_temperature, math.log(self.initial_temperature))
        init.constant_(self.mix_bias, math.log(INITIAL_MIX / (1 - INITIAL_MIX)))
        if self.conv1d is not None:
            init.normal_(self.conv1d.weight, std=self.conv1d.weight.shape[-1] ** -0.5)
        if self.confidence_proj is not None:
            init.normal_(self.confidence_proj.weight, std=std)
            init.constant_(self.confidence_proj.bias, INITIAL_CONFIDENCE)
        if self.prototypes is not None:
            init.normal_(self.prototypes, std=self.prototypes.shape[-1] ** -0.5)

    def start(self, batch_size: int, dtype: torch.dtype = torch.float32, device=None) -> dict[str, Tensor]:
        """The state before the first token."""
        B, H, M, d = batch_size, self.num_heads, self.num_slots, self.width // self.num_heads
        options = {"dtype": dtype, "device": device}
        fast = empty_slots(B, H, M, d, d, **options)
        deep = fast if self.prototypes is None else empty_transport(B, H, M, self.block_size, d, d, **options)
        state = _named("fast", fast) | _named("deep", deep)
        state["deep_free"] = torch.full((B,), M, device=device)
        state["surprise_mean"] = torch.zeros(B, self.width, **options)
        state["surprise_var"] = torch.ones(B, self.width, **options)
        if self.conv1d is not None:
            state["key_conv"] = torch.zeros(B, self.width, self.conv1d.weight.shape[-1] - 1, **options)
        return state

    def forward(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`state` may be empty; `mask` [B, T]: each row's real tokens first. Returns the output and the new state."""
        state = state or self._start(hidden_states)
        v = self._heads(self.value_proj(hidden_states), state)
        fast, deep, new_state, _ = self._run(hidden_states, hidden_states, v, state, mask)
        return self._combine(hidden_states, v, fast, deep)[0], new_state

    def read(self, key: Tensor, state: dict[str, Tensor], context: Tensor | None = None) -> DualTierRead:
        """Look up key [B, D] and change nothing; the gates depend on context [B, D], which is the key if absent."""
        key = key[:, None]
        context = key if context is None else context[:, None]
        state = state or self._start(key)
        q = self._queries(key, state)
        reads, weights = [], []
        for slots in (self._fast(state), self._deep(state)):
            value, strength = slots.value, slots.strength
            if isinstance(slots, TransportState):
                value, strength = value / torch.where(strength > 0, strength, 1.0)[..., None], strength.log()
            weights.append(slot_weights(q, slots.key, strength, self.top_k))
            entropy = torch.special.entr(weights[-1]).sum(-1)
            reads.append(SlotRead(weights[-1] @ value, weights[-1].amax(-1), entropy))
        out, confidence, _ = self._combine(context, self._heads(self.value_proj(key), state), *reads)
        fast, deep = reads
        return DualTierRead(
            out[:, 0],
            fast.value[:, :, 0],
            deep.value[:, :, 0],
            weights[0][:, :, 0],
            weights[1][:, :, 0],
            (0.5 * (fast.entropy + deep.entropy))[..., 0],
            confidence[..., 0],
            torch.maximum(fast.peak, deep.peak)[..., 0],
        )

    def write(
        self,
        key: Tensor,
        value: Tensor,
        state: dict[str, Tensor],
        weight: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], DualTierWrite]:
        """Write key and value [B, D], and return the new state and what was done.

        `weight` [B] in (0, 1] scales the strength of the slots that are written. Surprise is that of context [B, D],
        which is the key if absent. A `read` and a `write` with one x are what `forward` does with a token.
        """
        key, value = key[:, None], value[:, None]
        state = state or self._start(key)
        v = self._heads(self.value_proj(value), state)
        context = key if context is None else context[:, None]
        log_weight = None if weight is None else weight[:, None].to(v.dtype).log()
        _, _, new_state, (k, surprise, deep_write) = self._run(key, context, v, state, None, log_weight)
        return new_state, DualTierWrite(
            surprise[:, 0], deep_write[:, 0], k.flatten(1).norm(dim=-1), v.flatten(1).norm(dim=-1)
        )

    def apply_decay(self, state: dict[str, Tensor], steps: int = 1) -> dict[str, Tensor]:
        """The state after `steps` tokens that were neither read nor written."""
        lost = steps * math.log(self.decay)
        new_state = state | {"fast_strength": state["fast_strength"] + lost}
        deep = state["deep_strength"]
        return new_state | {"deep_strength": deep + lost if self.prototypes is None else deep * math.exp(lost)}

    @torch.no_grad()
    def statistics(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> dict[str, float]:
        """What the memory does with x [B, T, D], read from `state` on; pads do not count.

        - `surprise`, `surprise_max`: mean and largest s. `deep_writes`: share of tokens that the deep tier takes.
        - `mix`: the fast tier's share. `confidence`: r. `gain`: norm of the output relative to that of x.
        - `peak_*`, `entropy_*`: the largest weight and the entropy (nats) of each tier's read, means.
        - `filled_*`: share of slots that hold something at the end.
        """
        state = state or self._start(hidden_states)
        v = self._heads(self.value_proj(hidden_states), state)
        fast, deep, after, (_, surprise, write) = self._run(hidden_states, hidden_states, v, state, mask, entropy=True)
        out, confidence, mix = self._combine(hidden_states, v, fast, deep)
        real = torch.ones_like(surprise, dtype=torch.bool) if mask is None else mask.bool()
        per_token = {
            "surprise": surprise,
            "deep_writes": write.double(),
            "mix": mix.mean(1),
            "confidence": confidence.mean(1),
            "gain": out.norm(dim=-1) / hidden_states.norm(dim=-1).clamp(min=1e-12),
        }
        for name, tier in (("fast", fast), ("deep", deep)):
            per_token |= {f"peak_{name}": tier.peak.mean(1), f"entropy_{name}": tier.entropy.mean(1)}
        result = {name: value[real].double().mean().item() for name, value in per_token.items()}
        result["surprise_max"] = surprise[real].max().item()
        empty = 0.0 if self.prototypes is not None else -torch.inf
        result["filled_fast"] = (after["fast_strength"] > -torch.inf).double().mean().item()
        result["filled_deep"] = (after["deep_strength"] > empty).double().mean().item()
        return result

    def _start(self, like: Tensor) -> dict[str, Tensor]:
        return self.start(like.shape[0], torch.promote_types(like.dtype, torch.float32), like.device)

    def _fast(self, state: dict[str, Tensor]) -> SlotState:
        return SlotState(*(state[f"fast_{name}"] for name in SlotState._fields))

    def _deep(self, state: dict[str, Tensor]) -> SlotState | TransportState:
        kind = SlotState if self.prototypes is None else TransportState
        return kind(*(state[f"deep_{name}"] for name in kind._fields))

    def _heads(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        """[B, T, H d] -> [B, H, T, d] in the state's precision."""
        return x.to(state["surprise_mean"].dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _queries(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        q = self._heads((self.query_proj or self.key_proj)(x), state)
        return F.normalize(q, dim=-1) * (-self.log_temperature.to(q.dtype)).exp()[:, None, None]

    def _run(
        self,
        x: Tensor,
        context: Tensor,
        v: Tensor,
        state: dict[str, Tensor],
        mask: Tensor | None,
        log_weight: Tensor | None = None,
        entropy: bool = False,
    ) -> tuple[SlotRead, SlotRead, dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Both tiers' reads, the new state, and (key [B, H, T, d], surprise [B, T], deep writes [B, T])."""
        new_state = {}
        q, k = self._queries(x, state), self.key_proj(x)
        if self.conv1d is not None:
            tail, kernel = state["key_conv"], self.conv1d.weight.squeeze(1)
            k, new_tail = causal_conv1d(k.mT, kernel, None, tail.to(k.dtype), mask, activation=None)
            k, new_state["key_conv"] = k.mT, new_tail.to(tail.dtype)
        k = self._heads(k, state)
        surprise, statistics = self._surprise(context, state, mask)
        write, free = self._deep_gate(surprise, state["deep_free"], mask)
        new_state |= {**statistics, "deep_free": free}
        gate = F.logsigmoid((surprise - self.threshold) / self.softness)
        if log_weight is not None:
            gate = gate + log_weight
        options = {"mask": mask, "decay": self.decay, "top_k": self.top_k, "return_entropy": entropy}
        slots: SlotState | TransportState
        fast, slots = slot_memory(q, k, v, self._fast(state), strength=log_weight, rate=self.fast_rate, **options)
        new_state |= _named("fast", slots)
        options["rate"] = self.deep_rate
        if self.prototypes is None:
            deep, slots = slot_memory(q, k, v, self._deep(state), write, strength=gate, **options)
        else:
            mass = torch.where(write, gate.exp(), 0.0)
            deep, slots = transport_slots(q, k, v, self.prototypes, self._deep(state), mass, **options)
        return fast, deep, new_state | _named("deep", slots), (k, surprise, write)

    def _combine(self, x: Tensor, v: Tensor, fast: SlotRead, deep: SlotRead) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, T, D], the confidence and the mix [B, H, T]."""
        mix = (0.5 * (self.mix_bias.sigmoid() + self.mix_proj(x).sigmoid())).mT.to(v.dtype)  # [B, H, T]
        y = torch.lerp(deep.value, fast.value, mix[..., None])
        r = torch.ones_like(mix)
        if self.confidence_proj is not None:
            r = self.confidence_proj(x).sigmoid().mT.to(v.dtype) * torch.maximum(fast.peak, deep.peak)
            y = torch.lerp(v, y, r[..., None])
        return self.out_proj(y.transpose(1, 2).flatten(2).to(x.dtype)), r, mix

    def _surprise(self, x: Tensor, state: dict[str, Tensor], mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """s [B, T] and the running mean and variance after the last token."""
        mean, var = state["surprise_mean"], state["surprise_var"]
        h = self.surprise_proj(x).to(mean.dtype)
        step = torch.full_like(h[..., :1], self.momentum)
        if mask is not None:
            step = step * mask[..., None]
        keep = (1 - step).expand_as(h)
        means, new_mean = linear_scan(keep, step * h, mean)
        deviation = h - _before(means, mean)
        vars_, new_var = linear_scan(keep, step * deviation.square(), var)
        z = (deviation.abs() * (_before(vars_, var) + VARIANCE_FLOOR).rsqrt()).mean(-1)
        return torch.sigmoid(z - 1), {"surprise_mean": new_mean, "surprise_var": new_var}

    def _deep_gate(self, surprise: Tensor, free: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which tokens the deep tier takes [B, T], and how many slots it has not filled after them [B]."""
        real = torch.ones_like(surprise, dtype=torch.bool) if mask is None else mask.bool()
        count = real.cumsum(1)
        write = real & ((surprise > self.threshold) | (count <= free[:, None]))
        return write, (free - count[:, -1]).clamp(min=0)


def _named(tier: str, slots: NamedTuple) -> dict[str, Tensor]:
    return {f"{tier}_{name}": x for name, x in slots._asdict().items()}


def _before(x: Tensor, first: Tensor) -> Tensor:
    """x_{t-1}, with `first` before the first."""
    return torch.cat([first[:, None], x[:, :-1]], dim=1)
