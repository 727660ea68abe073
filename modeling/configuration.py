"""What the families' configurations share: misspelt fields are refused, memories are checked by a fingerprint."""

import difflib
import hashlib
import json
from typing import Any

from transformers import PreTrainedConfig


class MemoryModelConfig(PreTrainedConfig):
    """Base of the families' configurations.

    transformers keeps unknown keyword arguments silently. Here one that nearly matches a field is refused with the
    right name; the rest are kept, as transformers does, so that configs written by newer versions still load.
    """

    # names that are no fields and that __post_init__ takes, with their types
    further_names = {}  # type: ignore[var-annotated]  # an annotation would make it a field

    # fields that change neither the shape nor the meaning of a memory state
    memory_fingerprint_ignore = frozenset(
        {"use_cache", "dropout", "initializer_range", "output_router_logits", "tie_word_embeddings"}
        | {"bos_token_id", "eos_token_id", "pad_token_id"}
    )

    def take_mapped(self, kwargs: dict[str, Any]) -> None:
        """Set the fields that `attribute_map` names, before others are derived from them."""
        for name in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, name, kwargs.pop(name))

    def __post_init__(self, **kwargs: Any) -> None:
        known = {*self.own_fields(), *self.attribute_map, *self.further_names}
        inherited = set(PreTrainedConfig.__dataclass_fields__)
        for name in kwargs:
            if name in known or name in inherited or name.startswith("_"):
                continue
            close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.85)
            if close:
                raise ValueError(f"{type(self).__name__} has no field {name!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)

    def own_fields(self) -> list[str]:
        """The fields that the family adds to transformers' own."""
        return [name for name in self.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]

    def at_least_one(self, *names: str) -> None:
        """Refuse fields below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def divides(self, *pairs: tuple[str, str]) -> None:
        """Refuse a field that is not a multiple of the other."""
        for whole, part in pairs:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}; "
                    "every head has the same width"
                )

    def memory_fields(self) -> dict[str, Any]:
        """The family's own fields, those that a memory state depends on, as plain JSON values."""
        names = [name for name in self.own_fields() if name not in self.memory_fingerprint_ignore]
        fields = {name: getattr(self, name) for name in names}
        return {"model_type": self.model_type, **json.loads(json.dumps(fields, default=str))}

    def memory_fingerprint(self) -> str:
        """SHA-256 over `memory_fields`: two models with the same fingerprint have states of the same shapes."""
        return hashlib.sha256(json.dumps(self.memory_fields(), sort_keys=True).encode()).hexdigest()
