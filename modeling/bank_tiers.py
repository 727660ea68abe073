"""Tiers: several kinds of memory banks in one model, coarse and fine, each of its own size, chapters and placement."""

from typing import Any

# what belongs to the model or to its layers, not to one kind of bank
_OF_THE_MODEL = {"memory_tiers", "memory_block_variant", "memory_init_std", "memory_zero_init", "memory_dropout"}
_OF_THE_MODEL |= {"memory_gradient_checkpointing"}
# values that follow from others: a tier that names one of the first does not inherit what the model has of the second
_HEADS = ("memory_num_heads", "memory_num_key_value_heads")
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "memory_placement": ("memory_placement_k", "memory_layers"),
    "memory_dim": _HEADS,
    "memory_bank_type": _HEADS,
    "memory_bank_rank": _HEADS,
    "memory_num_heads": _HEADS[1:],
}


def tier_configs(config: Any) -> list[Any]:
    """One configuration for each kind of bank: `config` itself, or one for each entry of its `memory_tiers`.

    A model whose placement is "none" has no memory, whatever its tiers say.

    Raises:
        ValueError: no tiers in the list, a field that no tier has, or a tier that cannot be built; it names the tier.
    """
    if config.memory_tiers is None or config.memory_placement == "none":
        return [config]
    if not config.memory_tiers:
        raise ValueError("memory_tiers is empty; give it one dict for each tier, or None for one kind of bank")
    own = {name: getattr(config, name) for name in config.own_fields()}
    del own["memory_tiers"]
    return [_tier(config, own, i, tier) for i, tier in enumerate(config.memory_tiers)]


def _tier(config: Any, own: dict[str, Any], index: int, tier: dict[str, Any]) -> Any:
    for name in tier:
        if name in _OF_THE_MODEL or (name in own and not name.startswith("memory_")):
            raise ValueError(f"memory_tiers[{index}] sets {name}, which all tiers of a model share")
    inherited = {name: value for name, value in own.items() if name not in tier}
    for name, followers in _FOLLOWS.items():
        if name in tier:
            inherited = {other: value for other, value in inherited.items() if other not in followers}
    try:
        built = type(config)(**inherited, **tier)
    except Exception as error:  # of its types and of its values
        raise ValueError(f"memory_tiers[{index}]: {error}") from error
    if unknown := sorted(set(tier) - set(own)):  # transformers keeps these, and nothing would read them
        raise ValueError(f"memory_tiers[{index}] sets {unknown[0]}, which is no field of a bank")
    return built


def bank_of_layer(config: Any) -> dict[int, int]:
    """Which bank of its tier each reading layer reads."""
    readers = config.memory_layer_indices
    span = {"shared": max(len(readers), 1), "per_layer": 1, "group": config.memory_group_size}
    return {layer: i // span[config.memory_sharing] for i, layer in enumerate(readers)}
