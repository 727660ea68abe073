"""Configuration of a memory adapter."""

from dataclasses import dataclass, field, fields
from enum import StrEnum
from math import gcd
from typing import Any, Literal, get_args, get_origin

from peft import LoraConfig, PeftConfig

ARROW = "->"  # between the two sites in an entry of `target_modules`


class MemzooPeftType(StrEnum):
    """PEFT's own enumeration cannot be extended; a member that equals its name is found in PEFT's tables."""

    MEMZOO = "MEMZOO"


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class MemoryConfig(PeftConfig):
    """Memories for a frozen language model: `get_peft_model(model, MemoryConfig(...))`.

    The memory of a layer reads the residual stream between attention and feed-forward (block variant A) or after the
    feed-forward (B) and adds to it; it adds zero at the start. See docs/adapters.md.

    Raises:
        ValueError: an option that is none, or two that conflict; the message names both.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata=_help(
            "Where: the module that reads the residual stream before the feed-forward, 'ENTRY', or with the one "
            "whose output is added to it, 'ENTRY->EXIT' (such as ['ln_2->mlp']). None: known for the architecture."
        ),
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata=_help("Names of entries to leave out."))
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata=_help("Layers of a memory; placement='custom' needs them, other placements fill them in."),
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=_help("Name of the list of layers, found when None.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Modules of the base to train and save beside the memory.")
    )
    init_weights: bool = field(
        default=True, metadata=_help("The output projection starts at zero, so that nothing changes at first.")
    )
    memory_type: Literal["bank", "neural"] = field(
        default="bank",
        metadata=_help(
            "bank: learned tokens, read by attention; neural: a memory that is written while reading the text."
        ),
    )
    placement: Literal["all", "first_k", "last_k", "every_n", "custom"] = field(
        default="all",
        metadata=_help(
            "Which layers: all, the first or last placement_k, every placement_k-th, or layers_to_transform."
        ),
    )
    placement_k: int = field(default=1, metadata=_help("k of first_k and last_k, n of every_n."))
    sharing: Literal["shared", "per_layer", "group"] = field(
        default="per_layer",
        metadata=_help("A bank per memory layer, one for all, or one for every group_size of them."),
    )
    group_size: int = field(default=2, metadata=_help("Memory layers that share a bank with sharing='group'."))
    block_variant: Literal["A", "B"] = field(
        default="A", metadata=_help("A: memory before the feed-forward; B: after it.")
    )
    num_memory_tokens: int = field(default=256, metadata=_help("Learned tokens of a bank."))
    bank_type: Literal["standard", "factorized", "reduced"] = field(
        default="standard",
        metadata=_help(
            "Tokens as wide as the model; the same as a product of rank bank_rank; tokens of width bank_rank."
        ),
    )
    bank_rank: int = field(
        default=64, metadata=_help("Rank of factorized, width of reduced banks and of reduced neural memories.")
    )
    num_heads: int = field(default=8, metadata=_help("Heads of a memory."))
    num_key_value_heads: int | None = field(
        default=None, metadata=_help("Heads of a bank's keys and values; None: one for every eight of num_heads.")
    )
    dropout: float = field(default=0.0, metadata=_help("On what is read, while training."))
    num_chapters: int = field(
        default=1, metadata=_help("Equal parts of a bank that a router chooses from; 1 reads the whole bank.")
    )
    top_k_chapters: int = field(default=1, metadata=_help("Chapters that the router chooses for a token."))
    num_shared_chapters: int = field(
        default=0, metadata=_help("First chapters of the bank, which every token reads besides.")
    )
    routing: Literal["token", "prefix", "block", "prompt"] = field(
        default="token",
        metadata=_help(
            "What the router sees: the token, the mean up to it, of the block of 128 before its own, of the prompt."
        ),
    )
    router_aux_loss_coef: float = field(
        default=0.01, metadata=_help("Of the routers' load-balancing loss, added while training.")
    )
    router_z_loss_coef: float = field(default=0.001, metadata=_help("Of the size of the routers' logits."))
    lora_config: LoraConfig | dict | None = field(
        default=None, metadata=_help("LoRA on the same base, trained and saved together.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MemzooPeftType.MEMZOO
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.lora_config, dict):
            self.lora_config = LoraConfig(**self.lora_config)
        if self.lora_config is not None:
            self.lora_config.inference_mode = self.inference_mode
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        for option in fields(type(self)):
            choices, value = get_args(option.type), getattr(self, option.name)
            if get_origin(option.type) is Literal and value not in choices:
                raise ValueError(f"{option.name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
        counts = ("num_memory_tokens", "bank_rank", "num_heads", "placement_k", "group_size")
        for name in (*counts, "num_chapters", "top_k_chapters", "num_key_value_heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        for name in ("num_shared_chapters", "router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")

    def _check_combinations(self) -> None:
        tokens, chapters, shared = self.num_memory_tokens, self.num_chapters, self.num_shared_chapters
        if tokens % chapters:
            raise ValueError(f"num_chapters {chapters} does not divide num_memory_tokens {tokens}")
        if (chapters > 1 or self.top_k_chapters > 1) and self.top_k_chapters > chapters - shared:
            raise ValueError(
                f"top_k_chapters {self.top_k_chapters} is more than the {chapters - shared} chapters to choose from: "
                f"num_chapters {chapters} less num_shared_chapters {shared}"
            )
        if chapters == 1 and (shared or self.routing != "token"):
            raise ValueError(
                f"num_shared_chapters {shared} and routing {self.routing!r} belong to chapters; num_chapters is 1"
            )
        if self.placement == "custom" and self.layers_to_transform is None:
            raise ValueError("placement='custom' needs layers_to_transform, the numbers of the layers")
        if self.bank_type == "reduced" and self.bank_rank % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide bank_rank {self.bank_rank}, the width")
        if self.num_key_value_heads is not None and self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_heads {self.num_heads}"
            )
        if self.memory_type == "neural" and self.num_key_value_heads is not None:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} belongs to banks, not to memory_type 'neural'"
            )
        if self.memory_type == "neural" and (chapters > 1 or self.sharing != "per_layer"):
            raise ValueError(
                "a neural memory has no chapters and nothing to share: "
                f"num_chapters is {chapters} and sharing {self.sharing!r}"
            )
        if self.memory_type == "neural" and self.bank_type == "factorized":
            raise ValueError("a neural memory is 'standard', as wide as the model, or 'reduced' to bank_rank")

    def width(self, hidden_size: int) -> int:
        """Of the memory, for a base of this hidden size.

        Raises:
            ValueError: num_heads does not divide it, or bank_rank is more than hidden_size.
        """
        if self.bank_type != "standard" and self.bank_rank > hidden_size:
            raise ValueError(f"bank_rank {self.bank_rank} is more than the base's hidden size {hidden_size}")
        width = self.bank_rank if self.bank_type == "reduced" else hidden_size
        if width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide the memory's width {width}")
        return width

    def key_value_heads(self) -> int:
        """Of a bank. By default up to eight query heads share one, so that projecting the bank costs an eighth."""
        return self.num_key_value_heads or self.num_heads // gcd(self.num_heads, 8)

    def to_dict(self) -> dict[str, Any]:
        """As JSON wants it, lora_config nested."""
        lora, self.lora_config = self.lora_config, None
        try:
            values = super().to_dict()
        finally:
            self.lora_config = lora
        if isinstance(lora, LoraConfig):
            nested = {name: sorted(x) if isinstance(x, set) else x for name, x in lora.to_dict().items()}
            values["lora_config"] = {name: x for name, x in nested.items() if name != "runtime_config"}
        return values
