"""Pads as an exact no-op: real tokens are moved to the left of each row, and back after the layers.

With every row's real tokens contiguous, a causal convolution, a chunk boundary and a position count real tokens only,
so pads to the left, to the right or in the middle change no real token's output and no state.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Compaction(NamedTuple):
    """How to move real tokens to the left of each row and back."""

    order: Tensor  # [B, T] the column that each place takes
    mask: Tensor  # [B, T] bool, after the move: ones, then zeros

    def apply(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D] with the real tokens first."""
        return hidden.gather(1, self.order[..., None].expand_as(hidden))

    def undo(self, hidden: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return torch.zeros_like(hidden).scatter(1, self.order[..., None].expand_as(hidden), hidden)


def compaction(attention_mask: Tensor | None, batch_size: int, length: int, past: int) -> Compaction | None:
    """The move that an attention mask asks for, None when every token is real.

    Args:
        attention_mask: [B, T] for the input, or [B, past + T] as `generate` passes it; 0 marks a pad.
        batch_size, length: B and T of the input.
        past: columns that the memory has seen.

    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if shape not in ((batch_size, length), (batch_size, past + length)):
        raise ValueError(
            f"attention_mask is {list(shape)}; expected [{batch_size}, {length}], one entry a token of the input"
            + (f", or [{batch_size}, {past + length}] with the {past} tokens in the memory" if past else "")
        )
    mask = attention_mask[:, -length:].bool()
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    return Compaction(order, mask.gather(1, order))
