"""Learning rates by part of a model trained from scratch; for adapters see memzoo.adapters.memory_param_groups.

A parameter belongs to the first part whose pattern is found in its name:

    router      the routers of banks and chapters
    bank        what a memory holds before it has read anything: learned tokens, first slots, first weights
    memory      the projections, gates and norms around it
    embeddings  token embeddings and the head
    rest        everything else
"""

import re
from typing import Any

from torch import nn

from memzoo.training.config import ConfigError

PARTS = {
    "router": r"\.router\.",
    "bank": r"memory_banks\.|\.initial_banks|\.slot_keys|\.initial_weights|\.persistent$",
    "memory": r"\.(memory\w*|cell\w*)\.",
    "embeddings": r"embed_tokens|lm_head|wte",
    "rest": "",
}


def part_of(name: str) -> str:
    """The part that a parameter of this name belongs to."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, f".{name}"))


def freeze_parts(model: nn.Module, rates: dict[str, float]) -> None:
    """Parts whose rate is 0 need no gradient. Raises ConfigError for a part that the model does not have."""
    found = {part_of(name) for name, _ in model.named_parameters()}
    for part, rate in rates.items():
        if part not in found:
            raise ConfigError(f"learning_rates.{part}: this model has no such part; it has {', '.join(sorted(found))}")
        if rate == 0:
            for name, parameter in model.named_parameters():
                if part_of(name) == part:
                    parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("learning_rates: every part has rate 0; there is nothing to train")


def split_groups(groups: list[dict[str, Any]], model: nn.Module, rates: dict[str, float]) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, each split by part; a part that has no rate of its own keeps the group's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    split = []
    for group in groups:
        for part in PARTS:
            members = [p for p in group["params"] if part_of(names[id(p)]) == part]
            if members:
                split.append({**group, "params": members, "lr": rates.get(part, group["lr"]), "part": part})
    return split
