"""Configuration of the neural memory transformer."""

from typing import Any

from huggingface_hub.dataclasses import strict

from memzoo.modeling.neural_memory_config import NeuralMemoryConfig


@strict
class NeuralMemoryTransformerConfig(NeuralMemoryConfig):
    r"""Configuration of a decoder (RMSNorm, RoPE, SwiGLU) with a neural long-term memory in every block.

    The fields of the memory are those of `NeuralMemoryConfig`, documented there.

    Args:
        hidden_size: width D of the residual stream.
        num_key_value_heads: heads of keys and values in the attention; None is num_attention_heads.
        intermediate_size: hidden width of the feed-forward layer.
        max_position_embeddings: the longest text that `generate` and evaluation tools should give the model; None for
            any. Positions are rotary, so no parameter depends on it.
        sliding_window: tokens that a token of a "sliding_attention" layer sees, itself included; None for all. With
            windows everywhere the memory has a constant size.
        layer_types: "sliding_attention" or "full_attention" for every layer; None is sliding where sliding_window is
            given, and full otherwise.
        dropout: on the embedding, the attention weights and what every part adds to the residual stream.

    Example:

    ```python
    >>> from memzoo import NeuralMemoryTransformerConfig, NeuralMemoryTransformerForCausalLM

    >>> config = NeuralMemoryTransformerConfig(hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    >>> model = NeuralMemoryTransformerForCausalLM(config)
    >>> model.num_parameters() > 0
    True
    ```
    """

    model_type = "neural_memory_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "ffn_dim": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "pad_idx": "pad_token_id",
        "lmm_layers": "memory_depth",
        "lmm_learning_rate": "memory_theta_max",
        "lmm_momentum_decay": "memory_eta",
        "lmm_weight_decay": "memory_alpha",
        "lmm_gradient_clip": "memory_clip",
        "lmm_update_loss_threshold": "memory_threshold",
    }
    further_names = {"update_lmm_at_test_time": bool}

    vocab_size: int = 5000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int = 2048
    max_position_embeddings: int | None = None
    sliding_window: int | None = 128
    layer_types: list[str] | None = None
    rope_theta: float | int = 10000.0
    attention_bias: bool = False
    dropout: float | int = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    memory_fingerprint_ignore = NeuralMemoryConfig.memory_fingerprint_ignore | {"max_position_embeddings"}

    def __post_init__(self, **kwargs: Any) -> None:
        self.take_mapped(kwargs)
        if (at_test_time := kwargs.pop("update_lmm_at_test_time", None)) is not None:
            self.update_lmm_at_test_time = at_test_time
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.complete_memory()
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def update_lmm_at_test_time(self) -> bool:
        """The original's flag for `memory_update`: True is "always", False is "train"."""
        return self.memory_update == "always"

    @update_lmm_at_test_time.setter
    def update_lmm_at_test_time(self, value: bool) -> None:
        self.memory_update = "always" if value else "train"

    def validate_architecture(self) -> None:
        """Refuse what cannot be built, before anything is."""
        optional = [name for name in ("sliding_window", "max_position_embeddings") if getattr(self, name) is not None]
        self.at_least_one("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", *optional)
        self.at_least_one("num_key_value_heads", "intermediate_size")
        self.divides(("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"))
        self.validate_memory()
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} gives heads of "
                f"odd width {self.hidden_size // self.num_attention_heads}; rotary positions need an even one"
            )
        kinds = set(self.layer_types or [])
        if kinds - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types may be 'sliding_attention' or 'full_attention', not {sorted(kinds)}")
        if "sliding_attention" in kinds and self.sliding_window is None:
            raise ValueError(
                "layer_types has 'sliding_attention' and sliding_window is None; give it a width in tokens"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


__all__ = ["NeuralMemoryTransformerConfig"]
