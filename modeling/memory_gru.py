"""Recurrent cells with K memory banks, and the router that chooses banks ("mixture of memories").

- `MemoryRouter`, `RouterBalance`: soft or top-k routing with loss-free balancing (arXiv 2408.15664).
- `SequentialMemoryGRU`: a GRU whose gates, addresses and writes depend on h_{t-1}; exact, one step after another.
- `ParallelMemoryGRU`: a minGRU (arXiv 2410.01201) over gated slots (arXiv 2409.07146), whose gates and addresses
  depend on the input alone, so that cell and banks are linear recurrences, computed for all tokens at once.

Both cells map x [B, T, D] to h [B, T, H]; their memory is `h` [B, H] and, with K > 0 banks, `banks` [B, K, S, m].
Everything that depends on the input alone is one projection, `x_proj`, of all tokens at once. (The original's input
projection W_g is folded into it: two linear maps in a row are one.)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import initialization as init

from memzoo.kernels.memory_gru import MemoryGRUWeights, memory_gru
from memzoo.kernels.memory_gru.reference import route
from memzoo.kernels.memory_mingru import MemoryMinGRUWeights, memory_mingru, mingru, split_sizes
from memzoo.modeling.maru.configuration_maru import MaruConfig
from memzoo.modeling.untouched import untouched

INITIAL_STRENGTH = 8.0  # of addresses: a softmax over 128 cosines is flat without it


class RouterBalance(nn.Module):
    """Loss-free balancing (arXiv 2408.15664, algorithm 1) with a smoothed load, and the router's temperature.

    load <- momentum load + (1 - momentum) mean(p);  bias <- bias - rate (load - 1 / K)

    The mean is over the real tokens of all micro-batches of an optimizer step, on all ranks of torch.distributed; the
    update happens at the first training forward after the router's weights changed. Nothing changes in eval mode. What
    is counted is saved, so that a resumed run goes on alike. The bias shifts the choice of banks and, as it is part of
    the softmax, their weights.
    """

    bias: Tensor
    load: Tensor
    steps: Tensor
    total: Tensor
    count: Tensor
    seen: Tensor

    def __init__(self, config: MaruConfig, num_routed: int) -> None:
        super().__init__()
        self.rate = config.memory_balance_rate
        self.momentum = config.memory_balance_momentum
        self.temperatures = (config.memory_router_temperature, config.memory_router_temperature_min)
        self.temperature_decay = config.memory_router_temperature_decay
        self.register_buffer("bias", torch.zeros(num_routed))
        self.register_buffer("load", torch.full((num_routed,), 1 / num_routed))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("total", torch.zeros(num_routed))
        self.register_buffer("count", torch.zeros(()))
        # the router's weights at the last forward; a tensor's version counter misses fused optimizers and FSDP
        self.register_buffer("seen", torch.zeros(num_routed, config.memory_router_hidden_size), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        for buffer in (self.bias, self.steps, self.total, self.count, self.seen):
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
        """Once per optimizer step: the router's `weight` has changed since the last training forward. Never waits."""
        changed = (self.seen != weight).any() & (self.count > 0)
        mean = (self.total / self.count.clamp(min=1)).to(self.load.dtype)
        load = torch.where(changed, self.load.lerp(mean, 1 - self.momentum), self.load)
        self.bias.sub_(changed * self.rate * (load - 1 / load.numel()))
        self.load.copy_(load)
        self.steps += changed
        for counted in (self.total, self.count):
            counted.masked_fill_(changed, 0)
        self.seen.copy_(weight)

    @torch.no_grad()
    def observe(self, probabilities: Tensor, mask: Tensor | None) -> None:
        """Count the routing of a micro-batch; probabilities [B, T, Kr], mask [B, T]."""
        weight = torch.ones_like(probabilities[..., 0]) if mask is None else mask.to(probabilities.dtype)
        total = (probabilities * weight[..., None]).sum((0, 1))
        counted = torch.cat([total, weight.sum()[None]]).to(self.total.dtype)  # [Kr + 1]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counted)
        self.total += counted[:-1]
        self.count += counted[-1]


class MemoryRouter(nn.Module):
    """l = W_2 ReLU(W_x x + W_h h_{t-1} + b_1) + b_2 over the routed banks; h only where the cell is sequential.

    W_x and b_1 are a part of the cell's `x_proj`. The logits are divided by the temperature inside the cells, through
    `scaled`, which costs nothing per token.
    """

    def __init__(self, config: MaruConfig, recurrent: bool) -> None:
        super().__init__()
        self.top_k = config.memory_top_k
        self.shared_bank = config.memory_shared_bank
        self.noise = config.memory_router_noise
        num_routed = config.memory_num_banks - int(config.memory_shared_bank)
        hidden = config.memory_router_hidden_size
        self.h_proj = nn.Linear(config.cell_size, hidden, bias=False) if recurrent else None
        self.out_proj = nn.Linear(hidden, num_routed)
        self.balance = RouterBalance(config, num_routed)

    def offset(self, like: Tensor) -> Tensor:
        """What is added to the logits: the balancing bias and, while training, Gumbel noise. [Kr] or [B, T, Kr]."""
        if self.training:
            self.balance.advance(self.out_proj.weight)
        # a copy, as the next forward may write the bias before this one's backward
        bias = self.balance.bias.to(torch.promote_types(like.dtype, torch.float32), copy=True)
        if self.noise == "gumbel" and self.training:
            uniform = torch.rand(*like.shape[:2], bias.numel(), device=like.device, dtype=bias.dtype)
            bias = bias - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return bias

    def scaled(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors divided by the temperature."""
        temperature = self.balance.temperature
        if not isinstance(temperature, Tensor) and temperature == 1:
            return tensors
        return tuple(tensor / temperature for tensor in tensors)

    def finish(self, logits: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """Undo the scale of the cell's logits and, while training, count the routing for the balance."""
        if self.training:
            self.balance.observe(route(logits.detach() + offset, self.top_k, False), mask)
        temperature = self.balance.temperature
        return logits if not isinstance(temperature, Tensor) and temperature == 1 else logits * temperature


class MemoryCell(nn.Module):
    """What both cells share: x [B, T, D] -> h [B, T, H], the state, the router, the banks."""

    recurrent: bool

    def __init__(self, config: MaruConfig, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.cell_size = config.cell_size
        self.num_banks = config.memory_num_banks
        self.x_proj = nn.Linear(config.hidden_size, sum(sizes))
        if self.num_banks:
            shape = (self.num_banks, config.memory_num_slots, config.memory_dim)
            self.router = MemoryRouter(config, self.recurrent)
            self.initial_banks = nn.Parameter(torch.empty(shape))
            self.options = {
                "top_k": config.memory_top_k,
                "shared_bank": config.memory_shared_bank,
                "decay": config.memory_decay,
                "slot_norm_cap": config.memory_slot_norm_cap,
            }

    def forward(
        self,
        hidden_states: Tensor,
        state: dict[str, Tensor],
        mask: Tensor | None = None,
        output_memory_writes: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None]:
        """Returns h [B, T, H], the new state, the router's logits [B, T, Kr] and, if asked, writes [B, T, K, S]."""
        B = hidden_states.shape[0]
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        h0 = state["h"] if "h" in state else hidden_states.new_zeros(B, self.cell_size, dtype=dtype)
        x = self.x_proj(hidden_states)
        if not self.num_banks:
            h, h_last = self.run_without_banks(x, h0, mask)
            return h, {"h": h_last}, None, None
        banks = state["banks"] if "banks" in state else self.initial_banks.to(dtype).expand(B, -1, -1, -1)
        (offset,) = self.router.scaled(self.router.offset(x))
        options = {**self.options, "mask": mask, "return_writes": output_memory_writes}
        h, logits, (h_last, banks), *writes = self.run(x, h0, banks, offset, options)
        logits = self.router.finish(logits, offset, mask)
        return h, {"h": h_last, "banks": banks}, logits, writes[0] if writes else None

    def run(self, x: Tensor, h0: Tensor, banks: Tensor, offset: Tensor, options: dict[str, Any]) -> tuple:
        """The cell's kernel: h [B, T, H], logits [B, T, Kr], (h_T, banks_T), and the writes if asked."""
        raise NotImplementedError

    def run_without_banks(self, x: Tensor, h0: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The bare recurrence: h [B, T, H], h_T."""
        raise NotImplementedError


class SequentialMemoryGRU(MemoryCell):
    """The cell of `memzoo.kernels.memory_gru`: gates, addresses and writes read h_{t-1}."""

    recurrent = True

    def __init__(self, config: MaruConfig) -> None:
        H, m = config.cell_size, config.memory_dim
        # router, read query and strength, then the gates: reset, update, candidate
        banks = [config.memory_router_hidden_size, m + 1] if config.memory_num_banks else []
        super().__init__(config, [*banks, 3 * H])
        self.gates_h = nn.Linear(H, 3 * H, bias=False)
        if self.num_banks:
            self.query_h = nn.Linear(H, m + 1, bias=False)
            self.gates_c = nn.Linear(m, 3 * H, bias=False)
            self.write_proj = nn.Linear(H, 3 * m + 2)  # key, strength, gate, erase, add

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        if self.num_banks:
            m = self.initial_banks.shape[-1]
            init.normal_(self.initial_banks, std=m**-0.5)  # addresses are content: equal slots would stay equal
            _set(self.x_proj.bias, self.sizes[0] + m, INITIAL_STRENGTH)
            _set(self.write_proj.bias, m, INITIAL_STRENGTH)

    def run(self, x: Tensor, h0: Tensor, banks: Tensor, offset: Tensor, options: dict[str, Any]) -> tuple:
        router_out, router_out_bias = self.router.scaled(self.router.out_proj.weight, self.router.out_proj.bias)
        weights = MemoryGRUWeights(
            router_h=self.router.h_proj.weight,
            router_out=router_out,
            router_out_bias=router_out_bias,
            query_h=self.query_h.weight,
            gates_c=self.gates_c.weight,
            gates_h=self.gates_h.weight,
            write=self.write_proj.weight,
            write_bias=self.write_proj.bias,
        )
        return memory_gru(*x.split(self.sizes, dim=-1), h0, banks, weights, router_bias=offset, **options)

    def run_without_banks(self, x: Tensor, h0: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """A GRU: one bank of one empty slot that no gate reads."""
        B, T, _ = x.shape
        H, zeros = self.cell_size, x.new_zeros
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
        bank = h0.new_zeros(B, 1, 1, 1)
        h, _, (h_last, _) = memory_gru(zeros(B, T, 1), zeros(B, T, 2), x, h0, bank, weights, mask=mask)
        return h, h_last


class ParallelMemoryGRU(MemoryCell):
    """The cell of `memzoo.kernels.memory_mingru`: gates and addresses read the input, so time is computed at once."""

    recurrent = False

    def __init__(self, config: MaruConfig) -> None:
        H, m = config.cell_size, config.memory_dim
        sizes = split_sizes(config.memory_router_hidden_size, m, H) if config.memory_num_banks else [2 * H]
        super().__init__(config, sizes)
        if self.num_banks:
            self.gates_c = nn.Linear(m, 2 * H, bias=False)
            self.slot_keys = nn.Parameter(torch.empty_like(self.initial_banks))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        if self.num_banks:
            m = self.initial_banks.shape[-1]
            init.normal_(self.slot_keys, std=m**-0.5)
            # as large as the gates' other input, or the memory learns much later than the rest (docs/results.md)
            init.normal_(self.gates_c.weight, std=m**-0.5)
            init.zeros_(self.initial_banks)
            _set(self.x_proj.bias, slice(self.sizes[0] + 2 * m, self.sizes[0] + 2 * m + 2), INITIAL_STRENGTH)

    def run(self, x: Tensor, h0: Tensor, banks: Tensor, offset: Tensor, options: dict[str, Any]) -> tuple:
        router = self.router.scaled(self.router.out_proj.weight, self.router.out_proj.bias)
        weights = MemoryMinGRUWeights(*router, self.slot_keys, self.gates_c.weight)
        return memory_mingru(x, h0, banks, weights, offset, **options)

    def run_without_banks(self, x: Tensor, h0: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return mingru(x, h0, mask)

    def weights(self) -> tuple[Tensor, Tensor, MemoryMinGRUWeights, Tensor, dict[str, Any]] | None:
        """W_x and its bias, the cell's weights, the router's bias and the options: all that decides a token in eval.

        None where it is not all: no banks, an adapter or a hook on a part, a router's temperature other than 1.
        """
        parts: dict[str, Any] = self._modules
        if not (self.num_banks and untouched(parts["x_proj"], nn.Linear) and untouched(parts["gates_c"], nn.Linear)):
            return None
        router = parts["router"]
        out_proj, balance = router._modules["out_proj"], router._modules["balance"]
        if not untouched(out_proj, nn.Linear) or balance.temperatures[0] != 1 or balance.temperature_decay != 1:
            return None
        x_proj, gates_c = parts["x_proj"], parts["gates_c"]
        weights = MemoryMinGRUWeights(out_proj.weight, out_proj.bias, self.slot_keys, gates_c.weight)
        return x_proj.weight, x_proj.bias, weights, balance.bias, self.options


def _set(bias: Tensor, index: int | slice, value: float) -> None:
    """Initialise a part of a bias, zero elsewhere."""
    filled = torch.zeros_like(bias)
    filled[index] = value
    init.copy_(bias, filled)
