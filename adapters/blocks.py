"""What a memory computes at its place: a read of a bank of learned tokens, or of a memory written by the text itself.

Both take the residual stream x [B, T, D], normalise it without parameters, and return what is added to it.
"""

from typing import Any

from torch import Tensor, nn

from memzoo.adapters.config import MemoryConfig
from memzoo.kernels.rms_norm import rms_norm
from memzoo.modeling.memory_bank import MemoryBank, MemoryRead
from memzoo.modeling.neural_memory import NeuralMemory
from memzoo.modeling.padding import compaction

EPS = 1e-6


def build_bank(config: MemoryConfig, hidden_size: int) -> MemoryBank:
    config.width(hidden_size)
    rank = None if config.bank_type == "standard" else config.bank_rank
    return MemoryBank(config.num_memory_tokens, hidden_size, config.bank_type, rank, config.num_chapters)


class MemoryBlock(nn.Module):
    """x [B, T, D] -> what is added to it, the new state, and the router's logits or None."""

    stateful = True  # what it computes depends on the tokens before, beside those of the same call
    memory: MemoryRead | NeuralMemory

    def forward(
        self, x: Tensor, bank: MemoryBank | None, state: dict[str, Tensor], real: Tensor | None, prompt_lengths: Any
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """`real` [B, T] marks the tokens that are not pads, None for all."""
        shape = x.shape
        dtype: Any = self.memory.o_proj.weight.dtype
        x = x if x.ndim == 3 else x.reshape(-1, 1, shape[-1])
        move = compaction(real, x.shape[0], x.shape[1], 0) if self.stateful else None
        mask = move.mask if move is not None else None if self.stateful else real
        h = x.to(dtype) if move is None else move.apply(x.to(dtype))
        y, state, logits = self.read(h, bank, state, mask, prompt_lengths)
        y = y if move is None else move.undo(y)
        return y.to(x.dtype).view(shape), state, logits

    def read(self, h, bank, state, mask, prompt_lengths):
        """Of h [B, T, D] before its norm, real tokens first."""
        raise NotImplementedError


class BankBlock(MemoryBlock):
    """softmax(Q K' / sqrt(dh)) V W_o over a bank's tokens, with W_o = 0 at the start."""

    def __init__(self, config: MemoryConfig, hidden_size: int, own_bank: bool) -> None:
        super().__init__()
        self.stateful = config.num_chapters > 1 and config.routing != "token"
        self.memory = MemoryRead(
            hidden_size,
            config.width(hidden_size),
            config.num_heads,
            config.key_value_heads(),
            config.num_chapters,
            config.routing,
            config.top_k_chapters,
            config.num_shared_chapters,
            dropout=config.dropout,
            zero_init=config.init_weights,
            norm_eps=EPS,
        )
        self.memory.init_weights(hidden_size**-0.5)
        if self.memory.router is not None:
            self.memory.router.init_weights(hidden_size**-0.5)
        self.bank = build_bank(config, hidden_size) if own_bank else None

    def read(self, h, bank, state, mask, prompt_lengths):
        return self.memory(h, self.bank if bank is None else bank, state, mask, prompt_lengths)


class NeuralBlock(MemoryBlock):
    """A neural memory (`modeling/neural_memory.py`), gated in: its output projection starts at zero."""

    def __init__(self, config: MemoryConfig, hidden_size: int) -> None:
        super().__init__()
        self.memory = NeuralMemory(hidden_size, config.num_heads, config.width(hidden_size))
        self.memory.init_weights(hidden_size**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        if config.init_weights:
            nn.init.zeros_(self.memory.o_proj.weight)

    def read(self, h, bank, state, mask, prompt_lengths):
        y, state = self.memory(rms_norm(h, None, EPS), state, mask)
        return self.dropout(y), state, None


def build_block(config: MemoryConfig, hidden_size: int, own_bank: bool) -> MemoryBlock:
    if config.memory_type == "neural":
        return NeuralBlock(config, hidden_size)
    return BankBlock(config, hidden_size, own_bank)
