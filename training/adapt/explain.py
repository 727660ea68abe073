"""What a key of `memzoo adapt`'s YAML means, and its settings with every default filled in."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments

from memzoo.adapters.config import MemoryConfig
from memzoo.training.adapt.run import BEST
from memzoo.training.adapt.settings import SECTIONS, AdaptConfig, AdaptData, BaseConfig
from memzoo.training.trainer import training_arguments


@dataclass
class AdaptRates:
    """Rates by part of an adapted model: training.learning_rate where none is given, 0 freezes."""

    router: float | None = None  # of chapters
    bank: float | None = None  # the learned memory tokens
    projections: float | None = None  # what reads them
    lora: float | None = None  # of the section `lora`
    base: float | None = None  # the pretrained model itself, frozen without a rate


OF_ADAPT: dict[str, type] = {
    "base": BaseConfig,
    "memory": MemoryConfig,
    "lora": LoraConfig,
    "data": AdaptData,
    "learning_rates": AdaptRates,
}


def keys_of_adapt(section: str) -> dict[str, type]:
    """The keys of a section of `memzoo adapt`, with the dataclass that has them."""
    return dict.fromkeys(_chosen_by_users(OF_ADAPT[section]), OF_ADAPT[section])


def resolve_adapt(config: AdaptConfig) -> dict[str, Any]:
    """The settings with every default, as the YAML that gives the same run. Raises ConfigError as a run would."""
    args = training_arguments(config.training, {}, BEST).to_dict()
    names = [f.name for f in fields(TrainingArguments) if f.init and f.name != "local_rank"]
    resume = config.training.get("resume_from_checkpoint")
    settings = config.to_dict()
    for section, cls in (("memory", MemoryConfig), ("lora", LoraConfig)):
        if settings[section]:
            settings[section] = _defaults(cls) | settings[section]
    settings["training"] = {name: args[name] for name in names} | {"resume_from_checkpoint": resume}
    return {section: settings[section] for section in SECTIONS}


def _chosen_by_users(cls: type) -> list[str]:
    """PEFT fills in the others."""
    of_peft = {f.name for f in fields(PeftConfig)} | {"lora_config", "runtime_config"}
    return [f.name for f in fields(cls) if f.init and not (issubclass(cls, PeftConfig) and f.name in of_peft)]


def _defaults(cls: type) -> dict[str, Any]:
    known = {f.name: f for f in fields(cls)}
    chosen = {name: known[name] for name in _chosen_by_users(cls)}
    return {name: f.default if f.default_factory is MISSING else f.default_factory() for name, f in chosen.items()}
