"""Configuration of the memory-bank transformer."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from memzoo.modeling.bank_tiers import tier_configs
from memzoo.modeling.configuration import MemoryModelConfig

_PLACES = {"first_k": 5, "last_k": 5, "every_n": 3}  # first values of memory_placement_k


@strict
class MemoryBankTransformerConfig(MemoryModelConfig):
    r"""Configuration of a decoder whose layers read banks of learned memory tokens by cross-attention.

    Args:
        num_key_value_heads: heads of keys and values in the self-attention; None is num_attention_heads.
        sliding_window: tokens that a token sees, itself included; None for all before it.
        intermediate_size: hidden width of each feed-forward layer.
        dropout: on the embedding, the attention weights and what every part adds to the residual stream.
        memory_num_tokens: N learned tokens of a bank.
        memory_dim: width of a memory token and of the attention to it; None is hidden_size.
        memory_num_heads, memory_num_key_value_heads: of that attention; None is num_attention_heads (as far as it
            divides the width), and as many as memory_num_heads.
        memory_placement: layers with a memory: "all", "first_k", "last_k", "every_n" (0, n, 2 n, ...), "custom"
            (memory_layers) or "none", a plain transformer.
        memory_placement_k: k or n; None is 5 for k and 3 for n.
        memory_layers: of "custom": layer numbers, negative ones from the end.
        memory_sharing: one bank for all memory layers, one each, or one for every memory_group_size of them
            ("group"; the original says "every_k_layers").
        memory_tiers: several kinds of banks in one model: a dict for each with the memory fields in which it differs
            from the model's. A layer adds up what it reads of all of them; `tiers` are their configurations.
        memory_block_variant: "A" reads the memory between attention and feed-forward, "B" after the feed-forward,
            followed by a second one.
        memory_bank_type, memory_bank_rank: "standard" N x d, "factorized" N x r times r x d, or "reduced" N x r, read
            by an attention of width r.
        memory_projection_rank: rank of the projections of the memory's attention; None for full.
        memory_num_chapters: equal parts of a bank; 1 reads all of it.
        memory_top_k_chapters, memory_num_shared_chapters: chapters that the router chooses per token, and the first
            ones, which every token reads besides.
        memory_routing: what the router sees: the "token", the mean of the "prefix" up to it, of the "block" before its
            own, or of the "prompt". None looks ahead.
        memory_block_size: tokens of a block; of a prompt, unless the call passes `prompt_lengths` [B].
        memory_mixing: one softmax over all chapters that a token reads, weights in the exponent ("joint"), or one for
            each ("separate").
        memory_routed_scaling_factor: of the routed chapters' weights.
        memory_normalize_weights: weights of the chosen chapters sum to 1.
        memory_product_keys: chapters are scored by the sum of two keys: cheap for very many.
        memory_quantization: "int8" or "int4" banks: fixed ones, or with memory_quantization_aware trained in float
            and read as if quantized.
        memory_init_std: of memory tokens. memory_zero_init: W_o = 0, so that a new memory changes nothing.
        memory_dropout: on what is read. memory_gradient_checkpointing: read again in the backward.
        router_aux_loss_coef, router_variance_loss_coef, router_z_loss_coef: of the load balance, of the variance of
            the mean probabilities, and of the logits' size; added to the loss while training.
        output_router_logits: return the router's logits and the auxiliary loss.

    Example:

    ```python
    >>> from memzoo import MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM

    >>> config = MemoryBankTransformerConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    >>> MemoryBankTransformerForCausalLM(config).num_parameters() > 0
    True
    ```
    """

    model_type = "memory_bank_transformer"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]
    attribute_map = {
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "intermediate_dim": "intermediate_size",
        "num_memory_tokens": "memory_num_tokens",
        "memory_size": "memory_num_tokens",
        "memory_num_kv_heads": "memory_num_key_value_heads",
        "memory_layer_placement": "memory_placement",
        "memory_layer_placement_k": "memory_placement_k",
        "memory_sharing_k": "memory_group_size",
        "memory_rank": "memory_bank_rank",
        "num_chapters": "memory_num_chapters",
        "top_k_chapters": "memory_top_k_chapters",
        "num_shared_chapters": "memory_num_shared_chapters",
        "routing_window_size": "memory_block_size",
        "routed_scaling_factor": "memory_routed_scaling_factor",
        "wo_init_zero": "memory_zero_init",
        "load_balance_loss_coef": "router_aux_loss_coef",
        "auxiliary_loss_coef": "router_variance_loss_coef",
        "z_loss_coef": "router_z_loss_coef",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    sliding_window: int | None = None
    intermediate_size: int = 3072
    rope_theta: float | int = 10000.0
    dropout: float | int = 0.0
    rms_norm_eps: float = 1e-6
    memory_num_tokens: int = 1024
    memory_dim: int | None = None
    memory_num_heads: int | None = None
    memory_num_key_value_heads: int | None = None
    memory_placement: Literal["all", "first_k", "last_k", "every_n", "custom", "none"] = "all"
    memory_placement_k: int | None = None
    memory_layers: list[int] | None = None
    memory_sharing: Literal["shared", "per_layer", "group", "every_k_layers"] = "shared"
    memory_group_size: int = 2
    memory_tiers: list[dict[str, Any]] | None = None
    memory_block_variant: Literal["A", "B"] = "A"
    memory_bank_type: Literal["standard", "factorized", "reduced"] = "standard"
    memory_bank_rank: int = 64
    memory_projection_rank: int | None = None
    memory_num_chapters: int = 1
    memory_top_k_chapters: int = 1
    memory_num_shared_chapters: int = 0
    memory_routing: Literal["token", "prefix", "block", "prompt"] = "token"
    memory_block_size: int = 128
    memory_mixing: Literal["joint", "separate"] = "joint"
    memory_routed_scaling_factor: float | int = 1.0
    memory_normalize_weights: bool = True
    memory_product_keys: bool = False
    memory_quantization: Literal["int8", "int4"] | None = None
    memory_quantization_aware: bool = False
    memory_init_std: float = 0.02
    memory_zero_init: bool = True
    memory_dropout: float | int = 0.0
    memory_gradient_checkpointing: bool = False
    router_aux_loss_coef: float | int = 0.01
    router_variance_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    memory_fingerprint_ignore = MemoryModelConfig.memory_fingerprint_ignore | {
        "memory_dropout",
        "memory_gradient_checkpointing",
        "memory_init_std",
        "memory_zero_init",
        "router_aux_loss_coef",
        "router_variance_loss_coef",
        "router_z_loss_coef",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self._take_switches(kwargs)
        self.take_mapped(kwargs)
        if self.memory_tiers is not None:
            self.memory_tiers = [
                {self.attribute_map.get(name, name): value for name, value in tier.items()}
                for tier in self.memory_tiers
            ]
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.memory_dim = self.memory_dim or self.hidden_size
        if self.memory_num_heads is None:
            width, heads = self.memory_width, max(self.num_attention_heads, 1)
            self.memory_num_heads = next(h for h in range(heads, 0, -1) if width % h == 0)
        self.memory_num_key_value_heads = self.memory_num_key_value_heads or self.memory_num_heads
        if self.memory_placement_k is None:
            self.memory_placement_k = _PLACES.get(self.memory_placement)
        super().__post_init__(**kwargs)

    def _take_switches(self, kwargs: dict[str, Any]) -> None:
        """The original's pairs of a switch and a value, as the one field each that they are here."""
        sequence = {"sequence": "prompt", "sequence-rolling": "block", "rolling": "block", "hybrid": "block"}
        if kwargs.pop("vanilla_mode", False):
            self.memory_placement = "none"
        if self.memory_sharing == "every_k_layers":
            self.memory_sharing = "group"
        if mode := kwargs.pop("low_rank_mode", None):
            self.memory_bank_type = {"reduced_dim": "reduced"}.get(mode, mode)
        if not kwargs.pop("use_low_rank_memory", True):
            self.memory_bank_type = "standard"
        rank = kwargs.pop("projection_rank", None)
        if kwargs.pop("use_low_rank_projections", rank is not None):
            self.memory_projection_rank = rank or 64
        if not kwargs.pop("use_chapters", True):
            self.memory_num_chapters = 1
            for name in ("num_chapters", "top_k_chapters", "num_shared_chapters"):
                kwargs.pop(name, None)
        if strategy := kwargs.pop("routing_strategy", None):
            self.memory_routing = sequence.get(strategy, strategy)
        if bits := kwargs.pop("quantize_memory", None):
            self.memory_quantization = {8: "int8", 4: "int4"}.get(bits, bits)

    @property
    def tiers(self) -> list["MemoryBankTransformerConfig"]:
        """A configuration for each kind of bank that the model has: this one, without memory_tiers."""
        return tier_configs(self)

    @property
    def memory_width(self) -> int:
        """Width of the memory's attention."""
        return self.memory_bank_rank if self.memory_bank_type == "reduced" else self.memory_dim or self.hidden_size

    @property
    def memory_layer_indices(self) -> list[int]:
        """The layers that read a memory, ascending."""
        L, k = self.num_hidden_layers, self.memory_placement_k or 1
        if self.memory_placement == "custom":
            return sorted({i + L if i < 0 else i for i in self.memory_layers or []})
        places = {"all": range(L), "first_k": range(min(k, L)), "last_k": range(max(L - k, 0), L)}
        places |= {"every_n": range(0, L, k), "none": range(0)}
        return list(places[self.memory_placement])

    def validate_architecture(self) -> None:
        """Refuse what cannot be built, before anything is."""
        self.at_least_one("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.at_least_one("num_key_value_heads", "intermediate_size", "memory_num_tokens", "memory_dim")
        self.at_least_one("memory_num_heads", "memory_num_key_value_heads", "memory_group_size", "memory_block_size")
        self.at_least_one("memory_num_chapters", "memory_top_k_chapters", "memory_bank_rank")
        self.divides(("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"))
        self.divides(("memory_num_heads", "memory_num_key_value_heads"))
        if self.memory_num_tokens % self.memory_num_chapters:
            raise ValueError(
                f"memory_num_tokens {self.memory_num_tokens} is not a multiple of memory_num_chapters "
                f"{self.memory_num_chapters}; every chapter has the same size"
            )
        if self.memory_width % self.memory_num_heads:
            raise ValueError(f"memory_num_heads {self.memory_num_heads} does not divide the width {self.memory_width}")
        for name in ("sliding_window", "memory_placement_k", "memory_projection_rank"):
            if getattr(self, name) is not None:
                self.at_least_one(name)
        if self.memory_bank_type != "standard" and self.memory_bank_rank > self.memory_dim:
            raise ValueError(f"memory_bank_rank {self.memory_bank_rank} is more than memory_dim {self.memory_dim}")
        if (self.memory_placement == "custom") != (self.memory_layers is not None):
            raise ValueError("memory_layers and memory_placement='custom' belong together, give both or neither")
        L = self.num_hidden_layers
        for i in self.memory_layers or []:
            if not -L <= i < L:
                raise ValueError(f"memory_layers names layer {i} of a model with {L} layers")
        routed = self.memory_num_chapters - self.memory_num_shared_chapters
        if self.memory_num_chapters > 1 and not 1 <= self.memory_top_k_chapters <= routed:
            raise ValueError(
                f"memory_top_k_chapters {self.memory_top_k_chapters} is more than the {routed} chapters to route to: "
                f"{self.memory_num_chapters} less {self.memory_num_shared_chapters} shared"
            )
        if self.memory_num_shared_chapters < 0 or self.memory_routed_scaling_factor <= 0:
            raise ValueError(
                f"memory_num_shared_chapters {self.memory_num_shared_chapters} must not be negative and "
                f"memory_routed_scaling_factor {self.memory_routed_scaling_factor} must be positive"
            )
        if self.memory_quantization_aware and self.memory_quantization is None:
            raise ValueError("memory_quantization_aware needs memory_quantization, 'int8' or 'int4'")
        for name in ("dropout", "memory_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.memory_tiers is not None:
            tier_configs(self)


__all__ = ["MemoryBankTransformerConfig"]
