"""Configuration of the dual-tier memory models."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from memzoo.modeling.configuration import MemoryModelConfig

# the original's controllers, and attention over a window with the memory for what is older
PRESETS: dict[str, dict[str, Any]] = {
    "transformer": {"layer_types": ["full_attention"], "memory_layers": []},
    "mamba": {"layer_types": ["linear_attention"], "memory_layers": []},
    "mamba_dualmem": {"layer_types": ["linear_attention"]},
    "window_dualmem": {"layer_types": ["sliding_attention"]},
}


@strict
class DualMemoryConfig(MemoryModelConfig):
    r"""Configuration of a state-space or attention backbone with a fast and a deep tier of memory slots.

    Args:
        hidden_size: width D of the residual stream.
        layer_types: "linear_attention" (a selective state-space mixer), "sliding_attention" or "full_attention" (with
            a feed-forward layer) for every layer; a shorter list is repeated. None is state-space everywhere.
        state_size, conv_kernel, expand, time_step_rank, time_step_min, time_step_max: the state-space mixer (Mamba);
            time_step_rank None is ceil(D / 16).
        num_key_value_heads: heads of keys and values in the attention; None is num_attention_heads.
        sliding_window: tokens that a token of a "sliding_attention" layer sees, itself included.
        intermediate_size: hidden width of the attention layers' feed-forward; None is 8 / 3 D, up to a multiple of 8.
        use_bias: biases in the projections of mixers and attention.
        dropout: on the embedding, the attention weights and what every part adds to the residual stream.
        memory_layers: layers with a memory; negative ones count from the end, None is the last, [] turns it off.
        memory_num_slots: M slots in each tier.
        memory_num_heads, memory_dim: heads of the memory, and their width together; None is hidden_size.
        memory_query_proj: False takes queries from the projection of keys.
        memory_conv_kernel: width of the causal convolution of the memory's keys; None for none.
        memory_temperature: the first temperature of the reads; it is learned.
        memory_fast_rate, memory_deep_rate: share of a new token in a slot that was not empty; 1 overwrites.
        memory_decay, memory_decay_interval: what a slot's strength keeps in that many tokens, token by token.
        memory_top_k: slots that a head reads, None for all.
        memory_surprise_threshold: between 0 and 1; more surprising tokens are written to the deep tier.
        memory_surprise_momentum: of the running mean and variance that surprise is measured against.
        memory_surprise_temperature: of the gate's soft form, by which its gradient passes.
        memory_confidence: an uncertain read gives way to the token's own value.
        memory_assignment: slots of deep writes: "ring", the oldest, or "sinkhorn", by optimal transport of each block
            of memory_block_size tokens (None: half the slots).
        memory_residual: keep the residual stream beside what is read, or gate it.

    Example:

    ```python
    >>> from memzoo import DualMemoryConfig, DualMemoryForCausalLM

    >>> config = DualMemoryConfig.from_preset("mamba_dualmem", hidden_size=64, num_hidden_layers=2)
    >>> model = DualMemoryForCausalLM(config)
    >>> model.num_parameters() > 0
    True
    ```
    """

    model_type = "dual_memory"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "mem_slots": "memory_num_slots",
        "memory_n_heads": "memory_num_heads",
        "mem_n_heads": "memory_num_heads",
        "lr_fast": "memory_fast_rate",
        "lr_deep": "memory_deep_rate",
        "decay_rate": "memory_decay",
        "surprise_threshold": "memory_surprise_threshold",
        "use_query_proj": "memory_query_proj",
        "use_adaptive_retrieval": "memory_confidence",
        "use_memory_residual": "memory_residual",
        "top_k_retrieval": "memory_top_k",
    }

    vocab_size: int = 264
    hidden_size: int = 256
    num_hidden_layers: int = 4
    layer_types: list[str] | None = None
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    sliding_window: int = 64
    intermediate_size: int | None = None
    rope_theta: float | int = 10000.0
    use_bias: bool = False
    dropout: float | int = 0.1
    rms_norm_eps: float = 1e-6
    memory_layers: list[int] | None = None
    memory_num_slots: int = 64
    memory_num_heads: int = 1
    memory_dim: int | None = None
    memory_query_proj: bool = True
    memory_conv_kernel: int | None = 4
    memory_temperature: float | int = 0.1
    memory_fast_rate: float | int = 1.0
    memory_deep_rate: float | int = 0.5
    memory_decay: float | int = 1.0
    memory_decay_interval: int = 1
    memory_top_k: int | None = None
    memory_surprise_threshold: float | int = 0.5
    memory_surprise_momentum: float | int = 0.1
    memory_surprise_temperature: float | int = 0.1
    memory_confidence: bool = True
    memory_assignment: Literal["ring", "sinkhorn"] = "ring"
    memory_block_size: int | None = None
    memory_residual: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    # the first value of a learned temperature changes no state
    memory_fingerprint_ignore = MemoryModelConfig.memory_fingerprint_ignore | {"memory_temperature"}

    def __post_init__(self, **kwargs: Any) -> None:
        self.take_mapped(kwargs)
        self._take_switches(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 24) * 8
        if self.memory_dim is None:
            self.memory_dim = self.hidden_size
        if self.memory_block_size is None:
            self.memory_block_size = max(1, self.memory_num_slots // 2)
        n = self.num_hidden_layers
        pattern = self.layer_types or ["linear_attention"]
        self.layer_types = [pattern[i % len(pattern)] for i in range(max(n, len(pattern)))]
        if self.memory_layers is None:
            self.memory_layers = [-1]
        self.memory_layers = [i + n if i < 0 else i for i in self.memory_layers]
        super().__post_init__(**kwargs)

    def _take_switches(self, kwargs: dict[str, Any]) -> None:
        """The original's switches: each turns a field off, or on with the original's value."""
        ratio = kwargs.pop("compression_ratio", 0.5)
        # not in attribute_map: transformers would take it for the temperature of sampling
        self.memory_temperature = kwargs.pop("temperature", self.memory_temperature)
        for switch, field, on, off in (
            ("use_decay", "memory_decay", 0.999, 1.0),
            ("use_sparse_attention", "memory_top_k", 8, None),
            ("use_memory_compression", "memory_dim", int(ratio * self.hidden_size), None),
        ):
            value = kwargs.pop(switch, None)
            if value is False or (value and getattr(self, field) == off):
                setattr(self, field, on if value else off)

    def validate_architecture(self) -> None:
        """Refuse what cannot be built, before anything is."""
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "expand"]
        positive += ["num_attention_heads", "num_key_value_heads", "sliding_window", "intermediate_size"]
        positive += ["memory_num_slots", "memory_num_heads", "memory_dim", "memory_decay_interval"]
        for name in [*positive, *(["memory_conv_kernel"] if self.memory_conv_kernel is not None else [])]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        kinds = set(self.layer_types)
        if kinds - {"linear_attention", "sliding_attention", "full_attention"}:
            raise ValueError(
                f"layer_types may be 'linear_attention', 'sliding_attention' or 'full_attention', not {sorted(kinds)}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, but num_hidden_layers is {self.num_hidden_layers}"
            )
        pairs = [("memory_dim", "memory_num_heads")]
        if kinds != {"linear_attention"}:
            pairs += [("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")]
            if self.hidden_size % (2 * self.num_attention_heads) == self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} gives heads "
                    "of odd width; rotary positions need an even one"
                )
        for whole, part in pairs:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}; "
                    "every head has the same width"
                )
        for name in ("memory_top_k", "memory_block_size"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= self.memory_num_slots:
                raise ValueError(
                    f"{name} {getattr(self, name)} must be between 1 and memory_num_slots {self.memory_num_slots}"
                )
        for layer in self.memory_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"memory_layers names layer {layer}, but num_hidden_layers is {self.num_hidden_layers}"
                )
        if not 0 < self.time_step_min < self.time_step_max:
            raise ValueError(f"time_step_min={self.time_step_min} must be below time_step_max={self.time_step_max}")
        for name in ("memory_fast_rate", "memory_deep_rate", "memory_decay", "memory_surprise_momentum"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1]")
        for name in ("memory_temperature", "memory_surprise_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DualMemoryConfig":
        """A named configuration, with fields overridden: `DualMemoryConfig.from_preset("mamba", hidden_size=128)`.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["PRESETS", "DualMemoryConfig"]
