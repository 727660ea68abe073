"""The configuration fields of a neural memory, for the families that have one."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from memzoo.modeling.configuration import MemoryModelConfig


@strict
class NeuralMemoryConfig(MemoryModelConfig):
    """The fields that `NeuralMemory.from_config` reads. A family adds hidden_size, num_attention_heads, rms_norm_eps.

    Args:
        memory_enabled: False is the same model without its neural memories.
        memory_update: when reading changes the memory: "always", "train" (evaluation reads the learned first
            weights), or "never".
        memory_dim: width of the memory, all heads together; None is hidden_size.
        memory_num_heads: networks per layer, each memory_dim / memory_num_heads wide; None is num_attention_heads.
        memory_depth, memory_expansion: matrices of each network (1 is a linear memory), its hidden width in widths of
            a head.
        memory_residual: the network learns the difference of value and key.
        memory_chunk_size: tokens whose gradients are taken at the same weights; 1 is the exact rule.
        memory_conv_kernel: width of the causal convolution of the memory's queries, keys and values; None for none.
        memory_theta_max, memory_theta: largest step and first step, which is at most half the largest.
        memory_alpha, memory_eta: first decay per token (of the first and the last head, or of all); first momentum.
            Step, decay and momentum depend on the token and are learned.
        memory_clip: largest norm of a token's gradient, None for no limit.
        memory_threshold: a squared error below it changes nothing; None for no threshold.
        memory_read_own_write: a token reads the memory after its own write, or before it.
        memory_detach_every: chunks after which gradients of the past stop; None for never.
    """

    hidden_size: int = 512
    num_attention_heads: int = 8
    rms_norm_eps: float = 1e-6
    memory_enabled: bool = True
    memory_update: Literal["always", "train", "never"] = "always"
    memory_dim: int | None = None
    memory_num_heads: int | None = None
    memory_depth: int = 2
    memory_expansion: float | int = 2.0
    memory_residual: bool = False
    memory_chunk_size: int = 16
    memory_conv_kernel: int | None = 4
    memory_theta_max: float | int = 1.0
    memory_theta: float | int = 0.01
    memory_alpha: float | list[float] | tuple[float, float] = (1e-6, 1e-5)
    memory_eta: float | int = 0.9
    memory_clip: float | int | None = 1.0
    memory_threshold: float | int | None = None
    memory_read_own_write: bool = True
    memory_detach_every: int | None = None

    # first values of learned gates, and where training cuts, change no state
    memory_fingerprint_ignore = MemoryModelConfig.memory_fingerprint_ignore | {
        "memory_theta",
        "memory_alpha",
        "memory_eta",
        "memory_detach_every",
    }

    def __setattr__(self, name: str, value: Any) -> None:
        if self.attribute_map.get(name, name) == "memory_alpha":
            value = [value, value] if isinstance(value, (float, int)) else list(value)
        super().__setattr__(name, value)

    def complete_memory(self) -> None:
        """Fill in what follows from other fields."""
        self.memory_dim = self.memory_dim or self.hidden_size
        self.memory_num_heads = self.memory_num_heads or self.num_attention_heads
        self.memory_theta = min(self.memory_theta, self.memory_theta_max / 2)

    def validate_memory(self) -> None:
        """Refuse a memory that cannot be built, before anything is."""
        optional = ("memory_conv_kernel", "memory_detach_every")
        names = ["memory_dim", "memory_num_heads", "memory_depth", "memory_chunk_size"]
        self.at_least_one(*names, *(name for name in optional if getattr(self, name) is not None))
        self.divides(("memory_dim", "memory_num_heads"))
        if int(self.memory_expansion * (self.memory_dim // self.memory_num_heads)) < 1:
            raise ValueError(f"memory_expansion {self.memory_expansion} leaves the memory's network no hidden unit")
        for name in ("memory_theta_max", "memory_theta", "memory_clip"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.memory_threshold is not None and self.memory_threshold < 0:
            raise ValueError(f"memory_threshold is {self.memory_threshold}; it must not be negative, or None")
        if len(self.memory_alpha) != 2 or not all(0 < alpha < 1 for alpha in (*self.memory_alpha, self.memory_eta)):
            raise ValueError(
                f"memory_alpha {self.memory_alpha} (one number, or those of the first and the last head) and "
                f"memory_eta {self.memory_eta} must be between 0 and 1"
            )
