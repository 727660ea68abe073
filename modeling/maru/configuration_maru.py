"""Configuration of MARU."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from memzoo.kernels.gated_slots import MIN_DECAY
from memzoo.modeling.configuration import MemoryModelConfig

_PLAIN_ROUTER = {"memory_router_noise": "none", "memory_router_temperature_decay": 1.0, "memory_balance_rate": 0.0}
_GUMBEL_ROUTER = {"memory_router_noise": "gumbel", "memory_router_temperature_decay": 0.999}

PRESETS: dict[str, dict[str, Any]] = {
    # router stability: none, balancing alone (the default), all; and one ablation each
    "baseline": _PLAIN_ROUTER,
    "conservative": {},
    "full": _GUMBEL_ROUTER,
    "no_balancing": {**_GUMBEL_ROUTER, "memory_balance_rate": 0.0},
    "no_memory": {"memory_num_banks": 0},
    # the original's published size: one layer, width 640
    "maru_6.7m": {"hidden_size": 640, "num_hidden_layers": 1, "recurrence": "sequential"},
}


@strict
class MaruConfig(MemoryModelConfig):
    r"""Configuration of MARU: per layer a selective state-space mixer and a GRU cell with K memory banks.

    Args:
        hidden_size: width D of the residual stream.
        embedding_size: width of the token embedding, projected to D when it differs; None is D.
        cell_size: width H of the recurrent cell; None is D.
        recurrence: "parallel" (gates and addresses from the input; trains with scans) or "sequential" (from h_{t-1}).
        state_size, conv_kernel, expand, time_step_rank, time_step_min, time_step_max: the state-space mixer (Mamba);
            time_step_rank None is ceil(D / 16).
        use_bias: biases in the mixer's projections.
        dropout: on the embedding, the cell's input and its output.
        memory_num_banks: K banks; 0 turns the memory off.
        memory_num_slots, memory_dim: S slots of width m in each bank.
        memory_top_k: banks used per token, None for all. Does not count the shared bank.
        memory_shared_bank: bank 0 is always on, the router chooses among the others.
        memory_decay: what every slot keeps per token.
        memory_slot_norm_cap: largest norm of a slot, None for no cap.
        memory_router_hidden_size: hidden width of the router.
        memory_router_noise: "gumbel" adds Gumbel noise to the router while training.
        memory_router_temperature, memory_router_temperature_min, memory_router_temperature_decay: the router's
            temperature is max(min, temperature decay^(optimizer steps)).
        memory_balance_rate, memory_balance_momentum: loss-free balancing of the banks; rate 0 turns it off.
        output_router_logits: return the router's logits.

    Example:

    ```python
    >>> from memzoo import MaruConfig, MaruForCausalLM

    >>> model = MaruForCausalLM(MaruConfig(hidden_size=128, num_hidden_layers=2))
    >>> sum(p.numel() for p in model.parameters()) > 0
    True
    ```
    """

    model_type = "maru"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "memory_writes"]
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "embedding_dim": "embedding_size",
        "mamba_d_state": "state_size",
        "mamba_d_conv": "conv_kernel",
        "mamba_expand": "expand",
        "num_memories": "memory_num_banks",
        "memory_size": "memory_num_slots",
        "router_hidden_dim": "memory_router_hidden_size",
        "bias": "use_bias",
    }

    vocab_size: int = 264
    hidden_size: int = 256
    num_hidden_layers: int = 2
    embedding_size: int | None = None
    cell_size: int | None = None
    recurrence: Literal["parallel", "sequential"] = "parallel"
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    use_bias: bool = False
    dropout: float | int = 0.1
    rms_norm_eps: float = 1e-6
    memory_num_banks: int = 4
    memory_num_slots: int = 128
    memory_dim: int = 64
    memory_top_k: int | None = None
    memory_shared_bank: bool = False
    memory_decay: float | int = 1.0
    memory_slot_norm_cap: float | int | None = None
    memory_router_hidden_size: int = 32
    memory_router_noise: Literal["none", "gumbel"] = "none"
    memory_router_temperature: float | int = 1.0
    memory_router_temperature_min: float | int = 0.1
    memory_router_temperature_decay: float | int = 1.0
    memory_balance_rate: float | int = 0.01
    memory_balance_momentum: float | int = 0.9
    initializer_range: float = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    # training and routing schedules change no state
    memory_fingerprint_ignore = MemoryModelConfig.memory_fingerprint_ignore | {
        "memory_router_noise",
        "memory_balance_rate",
        "memory_balance_momentum",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self.take_mapped(kwargs)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.cell_size is None:
            self.cell_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse what cannot be built, before anything is."""
        positive = ["vocab_size", "hidden_size", "embedding_size", "cell_size", "num_hidden_layers", "state_size"]
        positive += ["conv_kernel", "expand", "memory_num_slots", "memory_dim", "memory_router_hidden_size"]
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        routed = self.memory_num_banks - int(self.memory_shared_bank)
        if self.memory_num_banks < 0 or (self.memory_shared_bank and routed < 1):
            raise ValueError(
                f"memory_num_banks={self.memory_num_banks} leaves no bank to route to beside the shared one"
            )
        if self.memory_top_k is not None and not 1 <= self.memory_top_k <= max(routed, 1):
            raise ValueError(f"memory_top_k={self.memory_top_k} must be between 1 and the {routed} routed banks")
        if not MIN_DECAY <= self.memory_decay <= 1:
            raise ValueError(f"memory_decay={self.memory_decay} must be between {MIN_DECAY} and 1")
        if self.memory_slot_norm_cap is not None and self.memory_slot_norm_cap <= 0:
            raise ValueError(f"memory_slot_norm_cap={self.memory_slot_norm_cap} must be positive, or None")
        if not 0 < self.time_step_min < self.time_step_max:
            raise ValueError(f"time_step_min={self.time_step_min} must be below time_step_max={self.time_step_max}")
        if not 0 < self.memory_router_temperature_min <= self.memory_router_temperature:
            raise ValueError("memory_router_temperature_min must be positive and at most memory_router_temperature")
        for name in ("dropout", "memory_balance_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 < self.memory_router_temperature_decay <= 1:
            raise ValueError(
                f"memory_router_temperature_decay={self.memory_router_temperature_decay} must be in (0, 1]"
            )
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"tie_word_embeddings needs embedding_size ({self.embedding_size}) = hidden_size ({self.hidden_size})"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MaruConfig":
        """A named configuration, with fields overridden: `MaruConfig.from_preset("full", hidden_size=128)`.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["PRESETS", "MaruConfig"]
