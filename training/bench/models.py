"""A model of any registered type at a given number of parameters.

All types start from the same small sizes, each taking those that its configuration has; then the width is scaled, and
the width of the MLP where there is one, until the number of parameters fits. Where hidden_size is given, it stays.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

from memzoo.training.bench.specs import Spec
from memzoo.training.config import ConfigError, parse_model
from memzoo.training.tasks.common import Task

TOLERANCE = 0.05
WIDTH = 64
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "dropout": 0.0,  # sequences are seen once
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Small memories, and windows shorter than the tasks: what is further back has to come from the memory.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "maru": {"memory_num_slots": 32, "memory_dim": 32},
    "dual_memory": {"sliding_window": 32},
    "memory_bank_transformer": {"memory_num_tokens": 64},
    "neural_memory_transformer": {"sliding_window": 32},
    "titan_mac": {"sliding_window": 32, "memory_segment_size": 32, "num_persistent_tokens": 4},
}


def parse_model_spec(spec: Spec) -> dict[str, Any]:
    """The spec as a `model:` section of a training run, checked. Raises ConfigError."""
    key = "pretrained" if Path(spec.name).is_dir() else "model_type"
    return parse_model({key: spec.name, **spec.overrides})


def build_config(spec: Spec, task: Task, parameters: int, longest: int) -> PreTrainedConfig:
    """The configuration of a model for `task`.

    Args:
        parameters: to scale the model to; 0 leaves the sizes alone. A pretrained model keeps its size.
        longest: tokens of the longest sequence, for types that have a limit.

    Raises:
        ConfigError: the type cannot be built, or not within 5 % of so many parameters.
    """
    section = parse_model_spec(spec)
    try:
        if "pretrained" in section:
            config = AutoConfig.from_pretrained(section.pop("pretrained"), **section)
            if config.vocab_size < task.vocab_size:
                raise ConfigError(f"has {config.vocab_size} tokens, the task {task.vocab_size}; give it the tokenizer")
            return config
        fixed = {"vocab_size": task.vocab_size, "max_position_embeddings": longest}
        if not parameters or "hidden_size" in section:
            return _config(section, fixed)
        return match_parameters(partial(_config, section, fixed), parameters)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"--model {spec}: {error.__cause__ or error}") from error


def match_parameters(make, parameters: int) -> PreTrainedConfig:
    """`make(hidden_size=..., [intermediate_size=...])` with sizes that come nearest to so many parameters.

    Raises:
        ValueError: the nearest is more than 5 % away.
    """
    step = 2 * getattr(make(), "num_attention_heads", 0) or 1  # rotary embeddings take an even width of a head
    low, high = 1, 2
    while count_parameters(make(hidden_size=high * step)) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count_parameters(make(hidden_size=middle * step)) < parameters:
            low = middle
        else:
            high = middle

    def distance(config: PreTrainedConfig) -> int:
        return abs(count_parameters(config) - parameters)

    best = min((_tune_mlp(make, width * step, parameters) for width in (low, high)), key=distance)
    if distance(best) > TOLERANCE * parameters:  # without an MLP to tune; not every type needs such steps
        best = min([best, *_possible(make, range(low * step + 1, high * step))], key=distance)
    if distance(best) > TOLERANCE * parameters:
        raise ValueError(
            f"the nearest to {parameters:,} parameters is {count_parameters(best):,} "
            f"(hidden_size={best.hidden_size}); "
            "change --params, or give smaller sizes (num_hidden_layers, memory_...)"
        )
    return best


def _possible(make, widths: Iterable[int]) -> Iterator[PreTrainedConfig]:
    """Configurations of those widths that the type can have."""
    for width in widths:
        with suppress(ValueError, StrictDataclassError):
            yield make(hidden_size=width)


def _tune_mlp(make, width: int, parameters: int) -> PreTrainedConfig:
    """Of this width, with the MLP's width as near to `parameters` as it comes; types without one as they are."""
    config = make(hidden_size=width)
    if not isinstance(before := getattr(config, "intermediate_size", None), int):
        return config
    count, step = count_parameters(config), 8
    slope = (count_parameters(make(hidden_size=width, intermediate_size=before + step)) - count) / step
    if slope <= 0:  # the size is derived, or was given
        return config
    return make(hidden_size=width, intermediate_size=max(round(before + (parameters - count) / slope), step))


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a causal language model, without making its weights."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def build_model(spec: Spec, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """New weights drawn from `seed`, or the pretrained ones."""
    set_seed(seed)
    if Path(spec.name).is_dir():
        return AutoModelForCausalLM.from_pretrained(spec.name, config=config)
    return AutoModelForCausalLM.from_config(config)


def _config(section: dict[str, Any], fixed: dict[str, Any], **widths: int) -> PreTrainedConfig:
    """The type's configuration; what was asked for wins over `widths`, and these over the common sizes."""
    config_class: Any = CONFIG_MAPPING[section["model_type"]]
    known = {field.name for field in fields(config_class) if field.init}
    width = widths.get("hidden_size", WIDTH)
    sizes = SIZES | {"intermediate_size": 2 * width} | OWN_SIZES.get(section["model_type"], {}) | fixed | widths
    asked = {config_class.attribute_map.get(key, key): value for key, value in section.items()}
    model_type, preset = asked.pop("model_type"), asked.pop("preset", None)
    values = {key: value for key, value in sizes.items() if key in known} | asked
    if preset is None:
        return AutoConfig.for_model(model_type, **values)
    return config_class.from_preset(preset, **values)
