"""What a sequence leaves behind in an adapter's memories: extra layers at the end of the base model's own cache.

A transformers cache is a list of layers; ours are `MemoryLayer`s, one for each memory of the model, and so follow
`reorder_cache`, `batch_repeat_interleave`, `batch_select_indices` and `reset` and refuse `crop`. A cache whose
adapters keep no state (banks with token routing) is left as it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memzoo.modeling.cache import MemoryLayer


class AdapterState(MemoryLayer):
    """The states of all adapters at one place of the base model, named `<adapter>.<state>`."""

    is_compileable = True  # or else the base's attention would not mask what a static cache has not filled

    def __init__(self) -> None:
        super().__init__()
        self.following: Any = None  # of a cache that offloads, the layer that is needed after ours

    def prefetch(self) -> None:
        """Also what an offloading cache would fetch during the base's last layer, were we not behind it: its first."""
        super().prefetch()
        if self.following is not None:
            self.following.prefetch()

    def read(self) -> dict[str, Tensor]:
        super().prefetch()
        return self.states

    def of(self, adapter: str, batch: int) -> dict[str, Tensor]:
        """The states of an adapter, empty before its first token.

        Raises:
            ValueError: they are of another number of sequences.
        """
        prefix = f"{adapter}."
        own = {name.removeprefix(prefix): x for name, x in self.read().items() if name.startswith(prefix)}
        if own and (rows := next(iter(own.values())).shape[0]) != batch:
            raise ValueError(
                f"the memory in the cache holds {rows} sequences and the input has {batch}; use "
                "cache.batch_repeat_interleave, cache.batch_select_indices or a new cache"
            )
        return own

    def put(self, adapter: str, states: dict[str, Tensor], new_tokens: int) -> None:
        """Replace an adapter's states."""
        self.write({**self.read(), **{f"{adapter}.{name}": x for name, x in states.items()}}, new_tokens)


def attach(cache: Cache, states: list[AdapterState], num_layers: int) -> None:
    """Put the states behind the cache's own `num_layers` layers, which a lazy cache may not have made yet."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    if cache.offloading and states:
        resident = [cache.only_non_sliding and sliding for sliding in cache.is_sliding]
        states[0].following = next((layer for layer, stays in zip(cache.layers, resident) if not stays), None)
    cache.layers.extend(states)


@dataclass
class Call:
    """What a layer's attention is told about the sequence: its mask, its cache and the lengths of its prompts."""

    mask: Any = None  # as the attention gets it: None, [B, T], [B, 1, T, past + T] or a flex attention BlockMask
    cache: Cache | None = None
    prompt_lengths: Tensor | None = None
    counted: bool = False  # whether its tokens are counted in the state

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> "Call":
        cache = kwargs.get("past_key_values")
        cache = cache if hasattr(cache, "layers") else None
        return cls(kwargs.get("attention_mask"), cache, kwargs.get("prompt_lengths"))

    def real(self, batch: int, length: int) -> Tensor | None:
        """[B, T] bool, which tokens are not pads; None if all are.

        A token that is not a pad attends to itself, so the diagonal of an attention mask tells.
        """
        mask = self.mask
        if mask is None:
            return None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask[:, -length:].bool()
        # the layer's attention has put the keys of these tokens into the cache already
        seen = 0 if self.cache is None else int(self.cache.get_seq_length()) - length
        if isinstance(mask, Tensor):
            first = min(seen, mask.shape[-1] - length)  # a window may have dropped the oldest keys
            diagonal = mask[:, 0, :, first : first + length].diagonal(dim1=-2, dim2=-1)
            real = diagonal if mask.dtype == torch.bool else diagonal == 0
        else:
            row = torch.arange(batch, device=mask.kv_indices.device)[:, None]
            column = torch.arange(length, device=row.device)[None]
            real = mask.mask_mod(row, torch.zeros_like(row), column, column + seen)
        return real.expand(batch, length)

    def state(self, index: int, count: int, num_layers: int) -> Any:
        """The `AdapterState` of memory `index` of `count` in the cache; None without a cache."""
        if self.cache is None:
            return None
        if not self.cache.layers or not isinstance(self.cache.layers[-1], AdapterState):
            attach(self.cache, [AdapterState() for _ in range(count)], num_layers)
        return self.cache.layers[index - count]
