"""A memory that was filled by reading, saved and loaded apart from the base model's keys and values."""

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from memzoo.adapters.states import AdapterState, attach
from memzoo.modeling.cache import MemoryCache

# what a state of a memory depends on
_FIELDS = ("memory_type", "block_variant", "bank_type", "bank_rank", "num_heads", "num_chapters", "top_k_chapters")


class MemoryIdentity:
    """What the states of a model's active adapters belong to; stands for a configuration in a `MemoryCache`."""

    def __init__(self, fields: dict[str, Any], num_memories: int) -> None:
        self.fields, self.num_hidden_layers = fields, num_memories

    def memory_fields(self) -> dict[str, Any]:
        return self.fields

    def memory_fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()


class Remembers:
    """Of `MemoryModel`: what the adapters' memories hold, as a `MemoryCache` of its own.

    ```python
    cache = DynamicCache(config=base.config)
    model(**text, past_key_values=cache)              # reads
    model.memory_of(cache).save_pretrained("memory")  # without the keys and values
    cache = model.recall("memory")                    # later, elsewhere: the base starts anew, the memory goes on
    model.generate(**question, past_key_values=cache)
    ```
    """

    if TYPE_CHECKING:
        model: PreTrainedModel
        active_adapters: list[str]
        peft_config: dict[str, Any]

    def memory_identity(self) -> Any:
        """What a snapshot must agree on with this model."""
        fields: dict[str, Any] = {"hidden_size": self._hosted().in_features, "memories": self._hosted().count}
        for adapter in self.active_adapters:
            config = self.peft_config[adapter]
            fields |= {f"{adapter}.{name}": getattr(config, name) for name in _FIELDS}
            layers = config.layers_to_transform
            fields[f"{adapter}.layers"] = [layers] if isinstance(layers, int) else layers
        return MemoryIdentity(fields, self._hosted().count)

    def memory_of(self, cache: Cache) -> MemoryCache:
        """The memories in a cache, as a view; `save_pretrained`, `nbytes`, `clone` and so on are `MemoryCache`'s.

        Raises:
            ValueError: there are none: the adapters keep no state, or nothing was read.
        """
        layers = [layer for layer in cache.layers if isinstance(layer, AdapterState)]
        if not layers:
            raise ValueError(
                "the cache holds no memory: nothing was read with it, or the active adapters keep no state (banks "
                "with token routing do not; memory_type='neural' does)"
            )
        memory = MemoryCache(self.memory_identity())
        memory.layers = list(layers)
        return memory

    def recall(
        self, memory: str | os.PathLike | MemoryCache, device: torch.device | str | None = None
    ) -> DynamicCache:
        """An empty cache of the base model with the memories of a snapshot's folder, or of `memory_of`.

        Raises:
            FileNotFoundError, ValueError: no snapshot, one of another model, or a damaged one.
        """
        if not isinstance(memory, MemoryCache):
            memory = MemoryCache.from_pretrained(memory, self.memory_identity(), device or self.model.device)
        states = []
        for layer in memory.layers:
            states.append(AdapterState())
            states[-1].write(layer.read(), layer.seen_tokens)
        cache = DynamicCache(config=self.model.config)
        attach(cache, states, self._hosted().num_layers)
        return cache

    def _hosted(self) -> Any:
        return self.model.memzoo
