"""What a key of a run's YAML means, and a run's settings with every default filled in."""

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, TrainingArguments

from memzoo.training.config import (
    SECTIONS,
    ConfigError,
    DataConfig,
    EarlyStopping,
    LearningRates,
    RunConfig,
    SampleConfig,
    TokenizerConfig,
    check_keys,
    parse_config,
    read_settings,
)
from memzoo.training.optim.factory import OPTIMIZERS, optimizer_options
from memzoo.training.trainer import source_of, training_arguments

OWN = {
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "sample": SampleConfig,
    "learning_rates": LearningRates,
    "early_stopping": EarlyStopping,
}
SECTIONS_OF_ADAPT = ("base", "memory", "lora", "data", "learning_rates")  # those with keys of their own
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


@dataclass
class Explanation:
    key: str
    type: str
    default: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.key}\n  type     {self.type}\n  default  {self.default}\n  meaning  {self.meaning}"


def explain(key: str) -> list[Explanation]:
    """`data.block_size`; `model.hidden_size` is explained for every family that has it, `model.maru.dropout` for one.

    Keys of `memzoo adapt` are explained too, beside those of `memzoo train` where both have them.

    Raises ConfigError, with the nearest name, for a key that does not exist.
    """
    section, _, name = key.partition(".")
    check_keys({section: None}, dict.fromkeys([*SECTIONS, *SECTIONS_OF_ADAPT]))
    if section == "model":
        return _explain_model(name)
    if section == "optimizer":
        return _explain_optimizer(name)
    cls: Any = TrainingArguments if section == "training" else OWN.get(section)
    known = {} if cls is None else dict.fromkeys((f.name for f in fields(cls) if f.init), cls)
    adapt: dict[str, type] = {}
    if section in SECTIONS_OF_ADAPT:
        from memzoo.training.adapt.explain import keys_of_adapt

        adapt = keys_of_adapt(section)
    if not name:
        lists = [f"its keys are {', '.join(known)}"] if known else []
        lists += [f"its keys for memzoo adapt are {', '.join(adapt)}"] if adapt else []
        raise ConfigError(f"{section}: a section; {'; '.join(lists)}")
    check_keys({name: None}, {**known, **adapt}, f"{section}.")
    found = [_explain_field(key, known[name], name)] if name in known else []
    return found + ([_explain_field(f"{key} of memzoo adapt", adapt[name], name)] if name in adapt else [])


def _explain_field(key: str, cls: type, name: str) -> Explanation:
    found = next(f for f in fields(cls) if f.name == name)
    meaning = found.metadata.get("help") or _comments(cls).get(name) or inspect.getdoc(cls) or ""
    return Explanation(key, _type_name(get_type_hints(cls)[name]), _default(found), " ".join(meaning.split()))


def resolve(config: RunConfig) -> dict[str, Any]:
    """The settings with every default, as the YAML that gives the same run. Raises ConfigError as a run would."""
    source_class = source_of(config)
    args = training_arguments(config.training, source_class.defaults, source_class.best_metric).to_dict()
    names = [f.name for f in fields(TrainingArguments) if f.init and f.name != "local_rank"]
    resume = config.training.get("resume_from_checkpoint")
    settings = config.to_dict()
    settings["model"] = _resolve_model(config.model)
    settings["training"] = {name: args[name] for name in names} | {"resume_from_checkpoint": resume}
    return {section: settings[section] for section in SECTIONS}


def resolve_file(path: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The same of a file, which is for `memzoo adapt` if it has a section `base`."""
    raw = read_settings(path, overrides, dict.fromkeys([*SECTIONS, *SECTIONS_OF_ADAPT]))
    if "base" not in raw:
        return resolve(parse_config(raw))
    from memzoo.training.adapt.explain import resolve_adapt
    from memzoo.training.adapt.settings import parse_adapt_config

    return resolve_adapt(parse_adapt_config(raw))


def _resolve_model(section: dict[str, Any]) -> dict[str, Any]:
    given = dict(section)
    pretrained, preset = given.pop("pretrained", None), given.pop("preset", None)
    try:
        if pretrained is not None:
            return section | _own_fields(AutoConfig.from_pretrained(pretrained, **given), keep=FROM_TOKENIZER)
        config_class: Any = CONFIG_MAPPING[given.pop("model_type")]
        config = config_class(**given) if preset is None else config_class.from_preset(preset, **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error.__cause__ or error}") from error
    return {"model_type": section["model_type"]} | _own_fields(config, keep=given)


def _own_fields(config: PreTrainedConfig, keep: Any) -> dict[str, Any]:
    """The family's own fields; those that follow the tokenizer only where they were given."""
    names = [f.name for f in fields(type(config)) if f.init and f.name in _annotated(type(config))]
    return {name: getattr(config, name) for name in names if name not in FROM_TOKENIZER or name in keep}


def _annotated(config_class: type) -> set[str]:
    own = [cls.__annotations__ for cls in config_class.__mro__ if issubclass(cls, PreTrainedConfig)]
    return {name for names in own[:-1] for name in names} - set(PreTrainedConfig.__annotations__)


def _explain_model(name: str) -> list[Explanation]:
    family, dot, field_name = name.partition(".")
    families = {family: CONFIG_MAPPING[family]} if dot and family in CONFIG_MAPPING else _families()
    field_name = field_name if dot else name
    found = []
    for model_type, config_class in families.items():
        own_name = config_class.attribute_map.get(field_name, field_name)
        for f in fields(config_class):
            if f.name == own_name and f.init and not f.name.startswith("_"):
                kind, meaning = _type_name(f.type), _documented(config_class).get(own_name, "see transformers")
                found.append(Explanation(f"model.{model_type}.{own_name}", kind, _default(f), meaning))
    if not found:
        known = {f.name for config_class in families.values() for f in fields(config_class) if f.init}
        near = difflib.get_close_matches(field_name, sorted(known), n=1, cutoff=0.5)
        hint = f"; did you mean model.{near[0]}?" if near else ""
        raise ConfigError(f"model.{name}: no family has such a field{hint}")
    return found


def _explain_optimizer(name: str) -> list[Explanation]:
    types = {"name": str} | {
        key: kind for optimizer in OPTIMIZERS for key, kind in optimizer_options(optimizer).items()
    }
    check_keys({name: None}, types, "optimizer.")
    if name == "name":
        return [Explanation("optimizer.name", "str", "none", f"a nested optimizer: {', '.join(OPTIMIZERS)}")]
    found = []
    for optimizer, cls in OPTIMIZERS.items():
        options = optimizer_options(optimizer)
        if name in options:
            parameter = inspect.signature(cls).parameters.get(name)
            default = "none" if parameter is None or parameter.default is parameter.empty else repr(parameter.default)
            meaning = _documented(cls).get(name, "groups by patterns of names; see docs/optimizers.md")
            found.append(Explanation(f"optimizer.{name} of {optimizer}", _type_name(options[name]), default, meaning))
    return found


def _families() -> dict[str, type[PreTrainedConfig]]:
    """memzoo's own."""
    return {name: cls for name, cls in CONFIG_MAPPING._extra_content.items() if cls.__module__.startswith("memzoo.")}


def _documented(cls: type) -> dict[str, str]:
    """The entries of the `Args:` of a docstring; several names may share one."""
    args = (inspect.getdoc(cls) or "").partition("Args:\n")[2]
    meanings = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", args, flags=re.MULTILINE):
        for name in names.split(","):
            meanings[name.strip()] = " ".join(text.split())
    return meanings


def _comments(cls: type) -> dict[str, str]:
    """The comment beside each field."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), flags=re.MULTILINE))


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return re.sub(r"\b(\w+\.)+", "", str(annotation))


def _default(found: Any) -> str:
    if found.default_factory is not MISSING:
        return repr(found.default_factory())
    return "none, it must be given" if found.default is MISSING else str(found.default)
