"""Recurrent cells with K memory banks, and the router that chooses banks ("mixture of memories").

- `MemoryRouter`, `RouterBalance`: soft or top-k routing with loss-free balancing (arXiv 2408.15664).
- `SequentialMemoryGRU`: a GRU whose gates, addresses and writes depend on h_{t-1}; exact, one step after another.
- `ParallelMemoryGRU`: a minGRU (arXiv 2410.01201) over gated slots (arXiv 2409.07146), whose gates and addresses
  depend on the input alone, so that cell and banks are linear recurrences, computed for all tokens at once.

Both cells map g [B, T, H] to h [B, T, H]; their memory is `h` [B, H] and, with K > 0 banks, `banks` [B, K, S, m].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.kernels.gated_slots import gated_slots
from memzoo.kernels.gated_slots import reference as gated_slots_reference
from memzoo.kernels.linear_scan import linear_scan
from memzoo.kernels.memory_gru import MemoryGRUWeights, memory_gru
from memzoo.modeling.maru.configuration_maru import MaruConfig

INITIAL_STRENGTH = 8.0  # of addresses: a softmax over 128 cosines is flat without it


class RouterBalance(nn.Module):
    """Loss-free balancing (arXiv 2408.15664, algorithm 1) with a smoothed load, and the router's temperature.

    load <- momentum load + (1 - momentum) mean(p);  bias <- bias - rate (load - 1 / K)

    The mean is over the real tokens of all micro-batches of an optimizer step; the update happens at the first
    training forward after the weights changed. Nothing changes in eval mode. The bias shifts the choice of banks and,
    as it is part of the softmax, their weights.
    """

    bias: Tensor
    load: Tensor
    steps: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, config: MaruConfig, num_routed: int) -> None:
        super().__init__()
        self.rate = config.memory_balance_rate
        self.momentum = config.memory_balance_momentum
        self.temperatures = (config.memory_router_temperature, config.memory_router_temperature_min)
        self.temperature_decay = config.memory_router_temperature_decay
        self.register_buffer("bias", torch.zeros(num_routed))
        self.register_buffer("load", torch.full((num_routed,), 1 / num_routed))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("total", torch.zeros(num_routed), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self._weight_version: int | None = None

    @torch.no_grad()
    def init_weights(self) -> None:
        for buffer in (self.bias, self.steps, self.total, self.count):
            init.zeros_(buffer)
        init.constant_(self.load, 1 / self.load.numel())

    @property
    def temperature(self) -> Tensor | float:
        """max(minimum, start decay^steps), steps being optimizer steps."""
        start, minimum = self.temperatures
        if self.temperature_decay == 1.0:
            return start
        return (start * self.temperature_decay ** self.steps.float()).clamp(min=minimum)

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """Once per optimizer step: an optimizer has written `weight` since the last training forward."""
        version = weight._version
        if self._weight_version not in (None, version) and self.count > 0:
            self.steps += 1
            self.load.lerp_((self.total / self.count).to(self.load.dtype), 1 - self.momentum)
            self.bias.sub_(self.rate * (self.load - 1 / self.load.numel()))
            self.total.zero_()
            self.count.zero_()
        self._weight_version = version

    @torch.no_grad()
    def observe(self, probabilities: Tensor, mask: Tensor | None) -> None:
        """Count the routing of a micro-batch; probabilities [B, T, Kr], mask [B, T]."""
        weight = torch.ones_like(probabilities[..., 0]) if mask is None else mask.to(probabilities.dtype)
        self.total += (probabilities * weight[..., None]).sum((0, 1)).to(self.total.dtype)
        self.count += weight.sum().to(self.count.dtype)


class MemoryRouter(nn.Module):
    """l = W_2 ReLU(W_1 [g; h_{t-1}] + b_1) + b_2 over the routed banks; h only where the cell is sequential."""

    def __init__(self, config: MaruConfig, recurrent: bool) -> None:
        super().__init__()
        self.top_k = config.memory_top_k
        self.shared_bank = config.memory_shared_bank
        self.noise = config.memory_router_noise
        num_routed = config.memory_num_banks - int(config.memory_shared_bank)
        hidden = config.memory_router_hidden_size
        self.x_proj = nn.Linear(config.cell_size, hidden)
        self.h_proj = nn.Linear(config.cell_size, hidden, bias=False) if recurrent else None
        self.out_proj = nn.Linear(hidden, num_routed)
        self.balance = RouterBalance(config, num_routed)

    def offset(self, like: Tensor) -> Tensor:
        """What is added to the logits: the balancing bias and, while training, Gumbel noise. [Kr] or [B, T, Kr]."""
        if self.training:
            self.balance.advance(self.out_proj.weight)
        bias = self.balance.bias.to(torch.promote_types(like.dtype, torch.float32))
        if self.noise == "gumbel" and self.training:
            uniform = torch.rand(*like.shape[:2], bias.numel(), device=like.device, dtype=bias.dtype)
            bias = bias - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return bias

    def weigh(self, logits: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """Bank weights [B, T, K] from logits [B, T, Kr]: softmax, top-k, the shared bank always on.

        The top k are not renormalised: with k = 1 the weight would be 1 and no gradient would reach the router
        (Switch Transformers, arXiv 2101.03961, eq. 2).
        """
        p = ((logits + offset) / self.balance.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < p.shape[-1]:
            values, banks = p.topk(self.top_k, dim=-1)
            p = torch.zeros_like(p).scatter(-1, banks, values)
        if self.training:
            self.balance.observe(p.detach(), mask)
        return F.pad(p, (1, 0), value=1.0) if self.shared_bank else p


class SequentialMemoryGRU(nn.Module):
    """The cell of `memzoo.kernels.memory_gru`; what depends on the input is projected for all tokens at once."""

    def __init__(self, config: MaruConfig) -> None:
        super().__init__()
        H, m = config.cell_size, config.memory_dim
        self.num_banks = config.memory_num_banks
        self.decay = config.memory_decay
        self.slot_norm_cap = config.memory_slot_norm_cap
        self.gates_x = nn.Linear(H, 3 * H)  # reset, update, candidate
        self.gates_h = nn.Linear(H, 3 * H, bias=False)
        if self.num_banks:
            self.router = MemoryRouter(config, recurrent=True)
            self.query_x = nn.Linear(H, m + 1)  # read query and strength
            self.query_h = nn.Linear(H, m + 1, bias=False)
            self.gates_c = nn.Linear(m, 3 * H, bias=False)
            self.write_proj = nn.Linear(H, 3 * m + 2)  # key, strength, gate, erase, add
            self.initial_banks = nn.Parameter(torch.empty(self.num_banks, config.memory_num_slots, m))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        if self.num_banks:
            m = self.initial_banks.shape[-1]
            init.normal_(self.initial_banks, std=m**-0.5)
            for bias in (self.query_x.bias, self.write_proj.bias):
                init.copy_(bias, F.pad(bias.new_tensor([INITIAL_STRENGTH]), (m, bias.numel() - m - 1)))

    def forward(
        self,
        hidden_states: Tensor,
        state: dict[str, Tensor],
        mask: Tensor | None = None,
        output_memory_writes: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None]:
        """Returns h [B, T, H], the new state, the router's logits [B, T, Kr] and, if asked, writes [B, T, K, S]."""
        B, _, H = hidden_states.shape
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        h0 = state["h"] if "h" in state else hidden_states.new_zeros(B, H, dtype=dtype)
        x_gates = self.gates_x(hidden_states)
        if not self.num_banks:
            return self._without_banks(x_gates, h0, mask)
        banks = state["banks"] if "banks" in state else self.initial_banks.to(dtype).expand(B, -1, -1, -1)
        router, temperature = self.router, self.router.balance.temperature
        offset = router.offset(hidden_states)
        weights = MemoryGRUWeights(
            router_h=router.h_proj.weight,
            router_out=router.out_proj.weight / temperature,
            router_out_bias=router.out_proj.bias / temperature,
            query_h=self.query_h.weight,
            gates_c=self.gates_c.weight,
            gates_h=self.gates_h.weight,
            write=self.write_proj.weight,
            write_bias=self.write_proj.bias,
        )
        h, logits, (h_last, banks), *writes = memory_gru(
            router.x_proj(hidden_states),
            self.query_x(hidden_states),
            x_gates,
            h0,
            banks,
            weights,
            router_bias=offset / temperature,
            mask=mask,
            top_k=router.top_k,
            shared_bank=router.shared_bank,
            decay=self.decay,
            slot_norm_cap=self.slot_norm_cap,
            return_writes=output_memory_writes,
        )
        logits = logits * temperature
        if self.training:
            router.weigh(logits.detach(), offset.detach(), mask)  # for the balance
        return h, {"h": h_last, "banks": banks}, logits, writes[0] if writes else None

    def _without_banks(self, x_gates: Tensor, h0: Tensor, mask: Tensor | None):
        """A GRU: one bank of one empty slot that no gate reads."""
        B, T, _ = x_gates.shape
        H = h0.shape[1]
        zeros = x_gates.new_zeros
        weights = MemoryGRUWeights(
            router_h=zeros(1, H),
            router_out=zeros(1, 1),
            router_out_bias=zeros(1),
            query_h=zeros(2, H),
            gates_c=zeros(3 * H, 1),
            gates_h=self.gates_h.weight,
            write=zeros(5, H),
            write_bias=zeros(5),
        )
        h, _, (h_last, _) = memory_gru(
            zeros(B, T, 1), zeros(B, T, 2), x_gates, h0, h0.new_zeros(B, 1, 1, 1), weights, mask=mask
        )
        return h, {"h": h_last}, None, None


class ParallelMemoryGRU(nn.Module):
    """h_t = (1 - z_t) h_{t-1} + z_t n_t with z, n from [g_t; c_t]; c_t is read from gated slots at learned addresses.

    An address is a softmax over a bank's slots of strength * cos(query, slot key). z = sigmoid(.), n = tanh(.).
    """

    def __init__(self, config: MaruConfig) -> None:
        super().__init__()
        H, m = config.cell_size, config.memory_dim
        self.num_banks = config.memory_num_banks
        self.decay = config.memory_decay
        self.slot_norm_cap = config.memory_slot_norm_cap
        self.gates_x = nn.Linear(H, 2 * H)  # update, candidate
        if self.num_banks:
            self.router = MemoryRouter(config, recurrent=False)
            self.query_x = nn.Linear(H, m + 1)  # read query and strength
            self.gates_c = nn.Linear(m, 2 * H, bias=False)
            self.write_proj = nn.Linear(H, 2 * m + 3)  # key, strength, value, gate, erase
            self.slot_keys = nn.Parameter(torch.empty(self.num_banks, config.memory_num_slots, m))
            self.initial_banks = nn.Parameter(torch.empty(self.num_banks, config.memory_num_slots, m))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        if self.num_banks:
            m = self.initial_banks.shape[-1]
            init.normal_(self.slot_keys, std=m**-0.5)
            init.normal_(self.initial_banks, std=std)
            for bias in (self.query_x.bias, self.write_proj.bias):
                init.copy_(bias, F.pad(bias.new_tensor([INITIAL_STRENGTH]), (m, bias.numel() - m - 1)))

    def _address(self, query: Tensor, strength: Tensor) -> Tensor:
        """Logits [B, T, K, S] of an address from a query [B, T, m] and a strength logit [B, T, 1]."""
        query = F.normalize(query, dim=-1) * (1 + F.softplus(strength))
        return (query @ F.normalize(self.slot_keys, dim=-1).flatten(0, 1).mT).unflatten(-1, self.slot_keys.shape[:2])

    def forward(
        self,
        hidden_states: Tensor,
        state: dict[str, Tensor],
        mask: Tensor | None = None,
        output_memory_writes: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None]:
        """Returns h [B, T, H], the new state, the router's logits [B, T, Kr] and, if asked, writes [B, T, K, S]."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        gates = self.gates_x(hidden_states)
        logits = writes = None
        new_state = {}
        if self.num_banks:
            read, new_state["banks"], logits, writes = self._memory(hidden_states, state, mask, output_memory_writes)
            gates = gates + self.gates_c(read)
        update, candidate = gates.to(dtype).chunk(2, dim=-1)
        update = update.sigmoid()
        if mask is not None:
            update = update * mask[..., None]
        h, new_state["h"] = linear_scan(1 - update, update * candidate.tanh(), state.get("h"))
        return h.to(hidden_states.dtype), new_state, logits, writes

    def _memory(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None, output_memory_writes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        m = self.slot_keys.shape[-1]
        router = self.router
        logits = router.out_proj(router.x_proj(hidden_states).relu())
        weights = router.weigh(logits, router.offset(hidden_states), mask)
        query, strength = self.query_x(hidden_states).split([m, 1], dim=-1)
        key, key_strength, value, gate, erase = self.write_proj(hidden_states).split([m, 1, m, 1, 1], dim=-1)
        value, gate, erase = value.tanh(), gate.sigmoid().squeeze(-1), erase.sigmoid().squeeze(-1)
        if self.slot_norm_cap is not None:  # |M| <= cap and |v| <= erase cap imply |(1 - w e) M + w v| <= cap
            cap = (erase * (0.99 * self.slot_norm_cap))[..., None]
            value = value * (cap / value.norm(dim=-1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)
        banks = state.get("banks")
        if banks is None:
            banks = self._first_banks().expand(hidden_states.shape[0], -1, -1, -1)
        arguments = (
            self._address(query, strength),
            self._address(key, key_strength),
            weights,
            gate,
            erase,
            value,
            banks,
        )
        read, banks = gated_slots(*arguments, decay=self.decay, mask=mask)
        writes = None
        if output_memory_writes:
            with torch.no_grad():
                writes = gated_slots_reference(*arguments, decay=self.decay, mask=mask)[2]
        return read.to(hidden_states.dtype), banks, logits, writes

    def _first_banks(self) -> Tensor:
        banks = self.initial_banks
        if self.slot_norm_cap is not None:
            norm = banks.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            banks = banks * (self.slot_norm_cap / norm).clamp(max=1.0)
        return banks
