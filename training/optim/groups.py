"""Parameter groups of a model by name: levels for ContinuumMemory, depths for NestedController."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn


def levels_by_name(model: nn.Module, levels: Mapping[str, int], default: int | None = None) -> list[dict[str, Any]]:
    """One group per pattern, with its period: `levels_by_name(model, {"embed|lm_head": 8, "memory": 1}, default=2)`.

    Patterns are regular expressions, searched in the parameters' names; parameters that need no gradient stay out.
    Those that no pattern names have period `default`. Raises ValueError, naming the parameter, where one is in two
    levels, in none while there is no default, and for a pattern that names nothing.
    """
    for pattern in levels:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    members: dict[str | None, list] = {pattern: [] for pattern in [*levels, None]}
    for name, p in trained_parameters(model):
        found = [pattern for pattern in levels if re.search(pattern, name)]
        if len(found) > 1:
            raise ValueError(f"{name} is in two levels, {found[0]!r} and {found[1]!r}; make the patterns disjoint")
        if not found and default is None:
            raise ValueError(f"{name} is in no level; add a pattern for it, or a default period")
        members[found[0] if found else None].append((name, p))
    for pattern in levels:
        if not members[pattern]:
            first = trained_parameters(model)[0][0]
            raise ValueError(f"no parameter's name matches {pattern!r}; names look like {first!r}")
    return [
        {"params": params, "period": default if pattern is None else levels[pattern]}
        for pattern, params in members.items()
        if params
    ]


def groups_by_depth(model: nn.Module) -> list[dict[str, Any]]:
    """One group per layer (the first number in a name), with `depth` from 0 to 1.

    What stands before the first layer is the first group, what stands after a layer and in none the last.
    """
    before, after = -1, 1 << 30
    members: dict[int, list] = {}
    for name, p in trained_parameters(model):
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        place = int(number[1]) if number else (after if any(i >= 0 for i in members) else before)
        members.setdefault(place, []).append((name, p))
    last = max(len(members) - 1, 1)
    return [{"params": members[place], "depth": i / last} for i, place in enumerate(sorted(members))]


def split_by_decay(groups: list[dict[str, Any]], decay_names: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """The same groups of (name, parameter), each in two: with `weight_decay` and, where it must not be, without."""
    split = []
    for group in groups:
        for decays in (True, False):
            params = [(name, p) for name, p in group["params"] if (name in decay_names) is decays]
            if params:
                split.append({**group, "params": params, "weight_decay": weight_decay if decays else 0.0})
    return split


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
