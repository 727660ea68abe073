"""The memory contract: what a model remembers of a sequence is a cache, never a weight.

- `MemoryLayer`: the named, batch-first states of one layer; tensors are replaced, never written in place.
- `MemoryCache(config)`: one `MemoryLayer` a layer; what `past_key_values` is for every memzoo model. Saved and loaded
  as a snapshot (safetensors + json), checked against the model's configuration.
- `MemoryGenerationMixin`: `generate` with a `MemoryCache`; every other cache is refused.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from memzoo.modeling.configuration import MemoryModelConfig
from memzoo.modeling.publish import publish

SNAPSHOT_FORMAT = 1
SNAPSHOT_WEIGHTS = "memory.safetensors"
SNAPSHOT_INDEX = "memory.json"


class MemoryLayer(CacheLayerMixin):
    """The memory of one layer: named states, dim 0 of each is the batch. There is no axis of time."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.seen_tokens = 0
        self.is_initialized = True
        self._home: torch.device | None = None  # where offloaded states belong

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(state.shape)}" for name, state in self.states.items())
        return f"MemoryLayer(seen_tokens={self.seen_tokens}, {shapes})"

    def read(self) -> dict[str, Tensor]:
        """The states, empty before the first token."""
        self.prefetch()
        return self.states

    def write(self, states: dict[str, Tensor], new_tokens: int) -> None:
        """Replace the states after `new_tokens` more columns of input."""
        self.states = dict(states)
        self.seen_tokens += new_tokens

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = {name: function(state) for name, state in self.states.items()}

    # transformers' cache layer interface

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: states appear with the first `write`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "a MemoryCache holds no keys and values to update; it belongs to memzoo's models. "
            "Pass other models transformers' DynamicCache."
        )

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return -1  # no maximum

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        self.states = {}
        self.seen_tokens = 0

    def offload(self) -> None:
        if self.states and self._home is None:
            self._home = next(iter(self.states.values())).device
            self.map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self._home is not None:
            home, self._home = self._home, None
            self.map(lambda state: state.to(home, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda state: state[indices.to(state.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise RuntimeError(
                "a memory cannot be rolled back: what it has read changed its state. Keep a copy taken before "
                "(`cache.clone()` or `cache.save_pretrained(folder)`) and go on from that."
            )


class MemoryCache(Cache):
    """The memory of a batch of sequences, passed to memzoo's models as `past_key_values`.

    Its size (`nbytes`) does not depend on how much was read, except for layers of full attention, which keep every
    token. It is functional: a forward replaces states and leaves the old tensors alone, so gradients flow across
    segments and a `clone()` costs nothing.

    Args:
        config: the configuration of the model that the memory belongs to.
    """

    def __init__(self, config: Any) -> None:
        # not isinstance: code that was loaded from the Hub may come in two copies
        if not hasattr(config, "memory_fingerprint"):
            raise TypeError(
                f"MemoryCache needs the configuration of a memzoo model, not {type(config).__name__}; "
                "other models use transformers' DynamicCache(config=config)"
            )
        super().__init__(layers=[MemoryLayer() for _ in range(config.num_hidden_layers)])
        self.config = config

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the configuration: what a snapshot and a model must agree on."""
        return self.config.memory_fingerprint()

    def read(self, layer_idx: int) -> dict[str, Tensor]:
        """The named states of a layer, empty before the first token."""
        return self.layers[layer_idx].read()

    def write(self, layer_idx: int, states: dict[str, Tensor], new_tokens: int) -> None:
        """Replace the states of a layer after `new_tokens` more columns of input."""
        self.layers[layer_idx].write(states, new_tokens)

    @property
    def states(self) -> dict[str, Tensor]:
        """Every state as `{"<layer>.<name>": tensor}`."""
        return {f"{i}.{name}": state for i, layer in enumerate(self.layers) for name, state in layer.states.items()}

    @property
    def batch_size(self) -> int:
        """Sequences remembered, -1 before the first token."""
        return next((state.shape[0] for layer in self.layers for state in layer.states.values()), -1)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self.states.values())

    @property
    def is_linear(self) -> list[bool]:
        return [True] * len(self.layers)

    def clone(self) -> "MemoryCache":
        """An independent cache over the same (never mutated) tensors."""
        other = MemoryCache(self.config)
        for mine, theirs in zip(self.layers, other.layers):
            theirs.write(mine.read(), mine.seen_tokens)
        return other

    def detach_(self) -> "MemoryCache":
        """Cut the graph behind the states: truncated backpropagation through time."""
        for layer in self.layers:
            layer.map(Tensor.detach)
        return self

    def reset_rows(self, rows: Tensor, start: "MemoryCache") -> None:
        """Begin anew in the rows [B] that are true, with the states of `start`, a memory of one sequence or of B.

        What a family begins with may be learned; a forward over a pad into an empty cache writes it.

        Raises:
            ValueError: a state's size depends on what was read, so that rows cannot begin at different times.
        """
        for layer, first in zip(self.layers, start.layers):
            for name, state in layer.read().items():
                other = first.read()[name].to(state)
                if other.shape[1:] != state.shape[1:]:
                    raise ValueError(
                        f"the state {name!r} is {list(state.shape)} and {list(other.shape)} at the start: it grows "
                        "with what is read, and single rows of it cannot be reset. Use a model of constant state."
                    )
                where = rows.to(state.device).reshape(-1, *[1] * (state.ndim - 1))
                layer.states = {**layer.states, name: torch.where(where, other, state)}

    def to(self, device: torch.device | str) -> "MemoryCache":
        """Move all states to a device."""
        for layer in self.layers:
            layer.prefetch()
            layer.map(lambda state: state.to(device))
        return self

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Move one layer's states, or all, to the CPU; the next read brings them back."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.offload()

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Bring offloaded states back to where they were."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.prefetch()

    def check(self, config: MemoryModelConfig, batch_size: int) -> None:
        """Refuse a cache that is not of this model (by its configuration) or of another batch size.

        Raises:
            ValueError: with the fields that differ, or the two batch sizes.
        """
        if self.config is not config and self.fingerprint != config.memory_fingerprint():
            difference = _difference(self.config.memory_fields(), config.memory_fields())
            raise ValueError(f"this memory belongs to another model: {difference}. Start from MemoryCache(config).")
        if self.batch_size not in (-1, batch_size):
            raise ValueError(
                f"this memory holds {self.batch_size} sequences and the input has {batch_size}; "
                "use cache.batch_repeat_interleave, cache.batch_select_indices or a new MemoryCache(config)"
            )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a snapshot: `memory.safetensors` (the states) and `memory.json` (what they belong to)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for layer in self.layers:
            layer.prefetch()
        states = {name: state.detach().to("cpu").contiguous().clone() for name, state in self.states.items()}
        index = {
            "format": SNAPSHOT_FORMAT,
            "config_fingerprint": self.fingerprint,
            "config": self.config.memory_fields(),
            "seen_tokens": [layer.seen_tokens for layer in self.layers],
            "states": {name: {"shape": list(s.shape), "dtype": str(s.dtype)[6:]} for name, s in states.items()},
        }
        # written beside and moved into place, so that a snapshot is never half there
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            save_file(states, Path(scratch) / SNAPSHOT_WEIGHTS, metadata={"format": "pt"})
            (Path(scratch) / SNAPSHOT_INDEX).write_text(json.dumps(index, indent=2) + "\n")
            for name in (SNAPSHOT_WEIGHTS, SNAPSHOT_INDEX):
                os.replace(Path(scratch) / name, folder / name)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
    ) -> str:
        """Publish a snapshot as one commit of the repository `repo_id` ("user/name"); returns the commit's address.

        `memzoo pull`, or `huggingface_hub.snapshot_download`, brings it back as a folder for `from_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return publish(folder, repo_id, "A memory, by memzoo", private, revision, token)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, config: PreTrainedConfig, device: torch.device | str = "cpu"
    ) -> "MemoryCache":
        """Load a snapshot for the model that has this configuration.

        Raises:
            FileNotFoundError: the folder holds no snapshot.
            ValueError: it is of another model, of another format, or damaged; the message says what to do.
        """
        folder = Path(folder)
        for name in (SNAPSHOT_INDEX, SNAPSHOT_WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no memory snapshot: {name} is missing")
        index = _read_index(folder / SNAPSHOT_INDEX)
        cache = cls(config)
        if index["config_fingerprint"] != cache.fingerprint:
            difference = _difference(index["config"], cache.config.memory_fields())
            raise ValueError(f"the memory in {folder} belongs to another model: {difference}")
        if len(index["seen_tokens"]) != len(cache.layers):
            raise ValueError(f"{folder / SNAPSHOT_INDEX} lists {len(index['seen_tokens'])} layers of {len(cache)}")
        states = _read_states(folder / SNAPSHOT_WEIGHTS, index["states"])
        for i, layer in enumerate(cache.layers):
            own = {name.split(".", 1)[1]: s.to(device) for name, s in states.items() if name.startswith(f"{i}.")}
            layer.write(own, index["seen_tokens"][i])
        return cache


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    shown = [f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names[:4]]
    return "; ".join(shown + ([f"and {len(names) - 4} more fields"] if len(names) > 4 else []))


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
        version = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the snapshot again") from error
    if version != SNAPSHOT_FORMAT:
        raise ValueError(
            f"{path} has snapshot format {version!r} and this memzoo reads {SNAPSHOT_FORMAT}; "
            "load it with the memzoo version that wrote it"
        )
    expected = {"config_fingerprint": str, "config": dict, "seen_tokens": list, "states": dict}
    for key, kind in expected.items():
        if not isinstance(index.get(key), kind):
            raise ValueError(
                f"{path} is damaged ({key!r} is missing or not a {kind.__name__}); save the snapshot again"
            )
    return index


def _read_states(path: Path, listed: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is cut short or not a safetensors file ({error}); save the snapshot again"
        ) from error
    found = {name: {"shape": list(s.shape), "dtype": str(s.dtype)[6:]} for name, s in states.items()}
    if found != listed:
        raise ValueError(
            f"{path} does not hold the states that {SNAPSHOT_INDEX} lists; the two files do not belong together"
        )
    return states


class MemoryGenerationMixin(GenerationMixin):
    """`generate` for models whose past is a `MemoryCache`.

    To go on from a filled memory, pass it as `past_key_values` with either the whole text as `input_ids`, which is
    transformers' convention, or only the new tokens when the old ones are gone: as many as the memory has seen, or
    fewer, are taken as new; for more, add an `attention_mask` of `cache.get_seq_length() + new` columns.
    """

    config: MemoryModelConfig

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any) -> None:
        name = type(self).__name__
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"{name} has no {generation_config.cache_implementation!r} cache: its memory is a MemoryCache. "
                "Remove cache_implementation."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = MemoryCache(self.config)
            return
        if not isinstance(cache, MemoryCache):
            raise TypeError(f"{name} remembers in a MemoryCache; past_key_values is a {type(cache).__name__}")
        cache._is_user_defined = True  # type: ignore[attr-defined]  # as GenerationMixin does
        # a mask that is longer than input_ids tells generate that the old tokens are not among them
        mask, seen = model_kwargs.get("attention_mask"), cache.get_seq_length()
        if mask is not None and mask.ndim == 2 and mask.shape[1] <= seen:
            model_kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], seen), mask], dim=1)
        elif mask is None and 0 < getattr(generation_config, "_mask_length", 0) <= seen:  # a mask of ones was dropped
            generation_config._mask_length += seen
