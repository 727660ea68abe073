"""Configuration of TitanMAC."""

import logging
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from memzoo.modeling.neural_memory_config import NeuralMemoryConfig

logger = logging.getLogger(__name__)

_TRAINING = "the optimizer is chosen for a run, from memzoo.training.optim"
# the original's fields that nothing here reads, and why
_WITHOUT_COUNTERPART = {
    "block_size": "windows are exact, not made of blocks",
    "memory_eta_lr": "the bank keeps pairs as they are written and takes no steps",
    **dict.fromkeys(("use_dmgd", "dmgd_hidden_dim", "dmgd_n_groups", "use_cms", "cms_frequencies"), _TRAINING),
}


@strict
class TitanMacConfig(NeuralMemoryConfig):
    r"""Configuration of a Titans decoder: windowed attention, persistent tokens and a neural long-term memory.

    The fields of the neural memory are those of `NeuralMemoryConfig`, documented there.

    Args:
        titans_variant: where the memory is: "mac" (its reads are context of the attention), "mag" (it gates the
            attention's output) or "mal" (it is a layer before the attention).
        sliding_window: tokens that a token sees, itself included. In "mac" with its memory a token sees its segment,
            which must not be longer.
        num_persistent_tokens: learned keys and values of every layer, visible to every token.
        intermediate_size: hidden width of the feed-forward layer.
        num_key_value_heads: heads of keys and values in the attention; None is num_attention_heads.
        max_position_embeddings: the longest text that `generate` and evaluation tools should give the model; None for
            any. Positions are rotary, so no parameter depends on it.
        dropout: on the embedding, the attention weights and what every part adds to the residual stream.
        memory_segment_size: tokens of a segment, None is sliding_window. "mac" reads the memory as it was before the
            segment; the bank's pairs can be found from the next segment on.
        memory_num_tokens: "mac" only: None reads a memory token for every token of the segment, with its own query; a
            number reads that many for the whole segment, with learned queries.
        memory_bank: a bank of key-value pairs in every layer, beside the neural memory or in its place.
        memory_bank_size, memory_bank_dim: pairs that a bank holds; width of keys and values, None is hidden_size / 4.
        memory_bank_top_k: pairs that a token reads.
        memory_bank_decay: what is left of a pair's usage after a segment; the least used pairs make room.

    Example:

    ```python
    >>> from memzoo import TitanMacConfig, TitanMacForCausalLM

    >>> config = TitanMacConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=128)
    >>> model = TitanMacForCausalLM(config)
    >>> model.num_parameters() > 0
    True
    ```
    """

    model_type = "titan_mac"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "window_size": "sliding_window",
        "n_persistent": "num_persistent_tokens",
        "norm_eps": "rms_norm_eps",
        "tie_weights": "tie_word_embeddings",
        "use_neural_memory": "memory_enabled",
        "d_memory": "memory_dim",
        "n_memory_layers": "memory_depth",
        "memory_theta_lr": "memory_theta_max",
        "segment_size": "memory_segment_size",
        "n_memory_tokens": "memory_num_tokens",
        "use_memory_bank": "memory_bank",
        "memory_capacity": "memory_bank_size",
        "memory_lambda_decay": "memory_bank_decay",
    }
    further_names = {"memory_rank_ratio": float | int, **dict.fromkeys(_WITHOUT_COUNTERPART, Any)}

    vocab_size: int = 32000
    hidden_size: int = 640
    num_hidden_layers: int = 16
    num_attention_heads: int = 10
    num_key_value_heads: int | None = None
    intermediate_size: int = 2560
    titans_variant: Literal["mac", "mag", "mal", "MAC", "MAG", "MAL"] = "mac"
    sliding_window: int = 512
    num_persistent_tokens: int = 16
    max_position_embeddings: int | None = None
    rope_theta: float | int = 10000.0
    dropout: float | int = 0.0
    rms_norm_eps: float = 1e-5
    memory_chunk_size: int = 64
    memory_segment_size: int | None = None
    memory_num_tokens: int | None = None
    memory_bank: bool = False
    memory_bank_size: int = 512
    memory_bank_dim: int | None = None
    memory_bank_top_k: int = 16
    memory_bank_decay: float | int = 0.95
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    memory_fingerprint_ignore = NeuralMemoryConfig.memory_fingerprint_ignore | {"max_position_embeddings"}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "titans_variant" and isinstance(value, str):
            value = value.lower()  # the original writes MAC, MAG, MAL
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs: Any) -> None:
        self.take_mapped(kwargs)
        for name, reason in _WITHOUT_COUNTERPART.items():
            if kwargs.pop(name, None):
                logger.warning("TitanMacConfig reads no %s: %s", name, reason)
        rank_ratio = kwargs.pop("memory_rank_ratio", 0.25)  # the original's width of the bank, in hidden sizes
        self.complete_memory()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.memory_segment_size is None:
            self.memory_segment_size = self.sliding_window
        if self.memory_bank_dim is None:
            self.memory_bank_dim = max(int(rank_ratio * self.hidden_size), 1)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse what cannot be built, before anything is."""
        optional = [name for name in ("max_position_embeddings",) if getattr(self, name) is not None]
        self.at_least_one("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", *optional)
        self.at_least_one("num_key_value_heads", "intermediate_size", "sliding_window", "memory_segment_size")
        self.at_least_one("memory_bank_size", "memory_bank_dim", "memory_bank_top_k")
        self.divides(("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"))
        self.validate_memory()
        head_dim = self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} gives heads of "
                f"odd width {head_dim}; rotary positions need an even one"
            )
        if self.num_persistent_tokens < 0:
            raise ValueError(f"num_persistent_tokens is {self.num_persistent_tokens}; it must be 0 or more")
        if self.memory_num_tokens is not None:
            self.at_least_one("memory_num_tokens")
            if self.titans_variant != "mac":
                raise ValueError(
                    f"memory_num_tokens={self.memory_num_tokens} is for titans_variant 'mac'; "
                    f"{self.titans_variant!r} reads the memory without memory tokens"
                )
        if self.memory_enabled and self.titans_variant == "mac" and self.sliding_window < self.memory_segment_size:
            raise ValueError(
                f"sliding_window {self.sliding_window} is smaller than memory_segment_size "
                f"{self.memory_segment_size}: 'mac' attends to whole segments; shorten them or widen the window"
            )
        if self.memory_bank_top_k > self.memory_bank_size:
            raise ValueError(
                f"memory_bank_top_k {self.memory_bank_top_k} is more than memory_bank_size {self.memory_bank_size}"
            )
        if not 0 < self.memory_bank_decay <= 1:
            raise ValueError(f"memory_bank_decay {self.memory_bank_decay} must be above 0 and at most 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


__all__ = ["TitanMacConfig"]
