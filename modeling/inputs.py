"""The checks that every family's forward makes before any compute."""

import torch
from torch import Tensor, nn

from memzoo.modeling.cache import MemoryCache


def embed_and_check(
    model: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    past_key_values: MemoryCache | None,
) -> Tensor:
    """Embed the input [B, T, E], refusing what the model cannot read.

    Raises:
        ValueError: neither or both inputs, an empty one, ids outside the vocabulary, a memory of another model.
        TypeError: `past_key_values` is not a MemoryCache.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    shape = (input_ids if input_ids is not None else inputs_embeds).shape
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(f"the input has shape {list(shape)}; it needs at least one token: [batch, length > 0]")
    if past_key_values is not None:
        if not isinstance(past_key_values, MemoryCache):
            raise TypeError(
                f"{type(model).__name__} remembers in a MemoryCache; past_key_values is a "
                f"{type(past_key_values).__name__}. Use memzoo.MemoryCache(model.config), or leave it out."
            )
        past_key_values.check(model.config, shape[0])
    if inputs_embeds is not None:
        return inputs_embeds
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high, size = int(input_ids.min()), int(input_ids.max()), model.embed_tokens.num_embeddings
        if low < 0 or high >= size:
            raise ValueError(
                f"input_ids hold {low if low < 0 else high}, outside the vocabulary of {size}; "
                "is this the model's own tokenizer?"
            )
    return model.embed_tokens(input_ids)
