"""The YAML file of a run, read strictly: an unknown key or a value of the wrong type is refused before any work.

Sections: `model`, `tokenizer`, `data`, `sample`, `optimizer`, `learning_rates`, `early_stopping`, `training`.
`training` takes any field of TrainingArguments by its own name, `model` any field of the model's config, `optimizer`
the `name` of a nested optimizer and its arguments (without it, `training.optim` decides). YAML is read with the
booleans and floats of YAML 1.2, so that `eval_strategy: no` is a string and `learning_rate: 1e-3` a number.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

SMALLEST_BPE = 264  # tokens
SECTIONS = ("model", "tokenizer", "data", "sample", "optimizer", "learning_rates", "early_stopping", "training")


class ConfigError(ValueError):
    """A setting that cannot be used; the message begins with the key's path and says what would do."""


@dataclass
class TokenizerConfig:
    """Which tokenizer: MARU's bytes, a BPE trained on the training text, or a `pretrained` folder or hub id."""

    type: Literal["bytes", "bpe"] | None = None  # bytes, unless `pretrained` or model.pretrained brings a tokenizer
    pretrained: str | None = None
    vocab_size: int = 8192  # of bpe, at most: a small text gives fewer
    min_frequency: int = 2  # of bpe: a pair seen less often is not merged


@dataclass
class DataConfig:
    """What to train on (exactly one of `corpus`, `path`, `dataset`, `task`), how it is split and cut into blocks."""

    corpus: Literal["sotu"] | None = None
    path: str | None = None  # a .txt file, or a folder of them (searched recursively)
    dataset: str | None = None  # a name or builder for datasets.load_dataset
    task: str | None = None  # a generated task of training/tasks
    task_kwargs: dict[str, Any] = field(default_factory=dict)  # fields of the task
    task_size: int | None = None  # sequences to train on; without it, as many new ones as training.max_steps needs
    task_eval_size: int = 500  # sequences to evaluate on
    streaming: bool = False  # with `path`: files are read and cut while the model trains; no block crosses two files
    shuffle_buffer: int = 1000  # with `streaming`: blocks to draw the next one from; 0 keeps the order of the files
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)  # data_files, name, revision, ...
    text_column: str = "text"
    train_split: str = "train"
    eval_split: str | None = None  # of `dataset`; without it, `eval_fraction` of the training split
    eval_path: str | None = None  # with `path`
    eval_fraction: float = 0.05  # held out from the end of the text
    max_eval_bytes: int | None = None  # evaluate on an equal share from the start of every document
    block_size: int = 256  # tokens the model sees at once
    across_documents: bool = False  # blocks run on from one document into the next, and so does the memory
    num_proc: int | None = None  # processes that tokenize


@dataclass
class SampleConfig:
    """Text written at every evaluation; an empty prompt starts from the beginning-of-text token."""

    prompts: list[str] = field(default_factory=lambda: [""])
    max_new_tokens: int = 100
    temperature: float = 0.8  # 0 is greedy


@dataclass
class LearningRates:
    """Rates by part of the model (memzoo.training.parts): training.learning_rate where none is given, 0 freezes."""

    router: float | None = None  # of banks and chapters
    bank: float | None = None  # what a memory holds at first: learned tokens, first slots, first weights
    memory: float | None = None  # the projections, gates and norms around it
    embeddings: float | None = None  # token embeddings and the head
    rest: float | None = None  # everything else


@dataclass
class EarlyStopping:
    """Ends training when the best metric has not improved for some evaluations; without the section, nothing does."""

    patience: int = 5  # evaluations without an improvement
    threshold: float = 0.0  # that an improvement must exceed


@dataclass
class RunConfig:
    model: dict[str, Any]
    tokenizer: TokenizerConfig
    data: DataConfig
    sample: SampleConfig
    training: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)  # those that are given
    early_stopping: dict[str, Any] = field(default_factory=dict)  # patience and threshold, or nothing

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
    return parse_config(read_settings(path, overrides, SECTIONS))


def read_settings(path: str, overrides: Iterable[str], sections: Iterable[str]) -> dict[str, Any]:
    """The sections of a YAML file with overrides applied, not yet checked. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as f:
            raw = yaml.load(f, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no sections; a run needs some of {', '.join(sections)}")
    for override in overrides:
        _apply_override(raw, override, sections)
    return raw


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Checks a nested dict of settings and fills in the defaults. Raises ConfigError."""
    check_keys(raw, SECTIONS)
    sections = {name: raw.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        check_type(name, section, dict)
    data = parse_dataclass("data", sections["data"], DataConfig)
    _check_data(data)
    sample = parse_dataclass("sample", sections["sample"], SampleConfig)
    tokenizer = parse_dataclass("tokenizer", sections["tokenizer"], TokenizerConfig)
    model = parse_model(sections["model"])
    _check_tokenizer(tokenizer, data, model)
    training, optimizer = parse_training(sections["training"]), _parse_optimizer(sections["optimizer"])
    if optimizer and "optim" in training:
        raise ConfigError("training.optim: optimizer.name already chooses the optimizer; leave one of the two out")
    rates = _parse_rates(sections["learning_rates"])
    config = RunConfig(model, tokenizer, data, sample, training, optimizer, rates)
    if sections["early_stopping"]:
        config.early_stopping = asdict(parse_dataclass("early_stopping", sections["early_stopping"], EarlyStopping))
        if config.early_stopping["patience"] < 1:
            raise ConfigError(f"early_stopping.patience: must be positive, got {config.early_stopping['patience']}")
    from memzoo.training.consistency import check_run

    check_run(config)
    return config


def _parse_rates(section: dict) -> dict[str, float]:
    rates = asdict(parse_dataclass("learning_rates", section, LearningRates))
    given = {part: rate for part, rate in rates.items() if rate is not None}
    for part, rate in given.items():
        if rate < 0:
            raise ConfigError(f"learning_rates.{part}: must not be negative, got {rate}")
    return given


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


def parse_dataclass(name: str, section: dict, cls: type) -> Any:
    check_keys(section, [f.name for f in fields(cls)], f"{name}.")
    hints = get_type_hints(cls)
    return cls(**{key: check_type(f"{name}.{key}", value, hints[key]) for key, value in section.items()})


def _check_data(data: DataConfig) -> None:
    known = ("corpus", "path", "dataset", "task")
    sources = [name for name in known if getattr(data, name)]
    if len(sources) != 1:
        given = " and ".join(f"data.{name}" for name in sources) or "none"
        listed = ", ".join(f"data.{name}" for name in known)
        raise ConfigError(f"data: give exactly one of {listed} (given: {given})")
    for key, source in _GOES_WITH.items():
        if sources != [source] and _is_given(data, key):
            raise ConfigError(f"data.{key}: goes with data.{source}, not with data.{sources[0]}")
    for key in _OF_TEXT:
        if sources == ["task"] and _is_given(data, key):
            raise ConfigError(f"data.{key}: goes with a text, not with data.task")
    if not data.streaming and _is_given(data, "shuffle_buffer"):
        raise ConfigError("data.shuffle_buffer: goes with data.streaming; without it, every epoch is shuffled whole")
    if data.streaming and data.across_documents:
        raise ConfigError("data.across_documents: goes with a text in memory; a stream's blocks lie within one file")
    if not 0 <= data.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction: must lie in [0, 1), got {data.eval_fraction}")
    if data.block_size < 2:
        raise ConfigError(f"data.block_size: must be at least 2 tokens, got {data.block_size}")
    for key in ("max_eval_bytes", "task_size", "task_eval_size", "num_proc"):
        if getattr(data, key) is not None and getattr(data, key) < 1:
            raise ConfigError(f"data.{key}: must be positive, got {getattr(data, key)}")
    if data.shuffle_buffer < 0:
        raise ConfigError(f"data.shuffle_buffer: must not be negative, got {data.shuffle_buffer}")


_GOES_WITH = {
    "eval_path": "path",
    "streaming": "path",
    "dataset_kwargs": "dataset",
    "text_column": "dataset",
    "train_split": "dataset",
    "eval_split": "dataset",
    "task_kwargs": "task",
    "task_size": "task",
    "task_eval_size": "task",
}
_OF_TEXT = ("eval_fraction", "max_eval_bytes", "block_size", "across_documents", "num_proc")


def _is_given(section: Any, key: str) -> bool:
    return getattr(section, key) != getattr(type(section)(), key)


def check_bpe_size(path: str, vocab_size: int) -> None:
    """Refuses a vocabulary that has no room for every byte."""
    if vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"{path}: a BPE has 256 bytes and 8 special tokens; use {SMALLEST_BPE} or more, not {vocab_size}"
        )


def _check_tokenizer(tokenizer: TokenizerConfig, data: DataConfig, model: dict[str, Any]) -> None:
    if tokenizer.type is not None and tokenizer.pretrained is not None:
        raise ConfigError("tokenizer.type: goes without tokenizer.pretrained; leave one of the two out")
    for key in ("vocab_size", "min_frequency"):
        if tokenizer.type != "bpe" and _is_given(tokenizer, key):
            raise ConfigError(f"tokenizer.{key}: goes with tokenizer.type bpe")
    check_bpe_size("tokenizer.vocab_size", tokenizer.vocab_size)
    if tokenizer.min_frequency < 1:
        raise ConfigError(f"tokenizer.min_frequency: must be positive, got {tokenizer.min_frequency}")
    if data.task and tokenizer != TokenizerConfig():
        raise ConfigError("tokenizer: data.task brings its own tokens; leave the section out")
    if tokenizer.type == "bpe" and "pretrained" in model:
        raise ConfigError("tokenizer.type: a new BPE does not fit the vocabulary of model.pretrained; leave it out")
    if tokenizer.type == "bpe" and model.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {model['vocab_size']} is below the {tokenizer.vocab_size} of tokenizer.vocab_size; "
            "leave it out, or make the two equal"
        )


def parse_model(section: dict) -> dict:
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
    types |= getattr(config_class, "further_names", {})
    check_keys(section, [*own, *types, *config_class.attribute_map], "model.")
    return {
        key: check_type(f"model.{key}", value, types.get(config_class.attribute_map.get(key, key), Any))
        for key, value in section.items()
    }


def _parse_optimizer(section: dict) -> dict:
    """`name` and arguments of a nested optimizer, or nothing."""
    from memzoo.training.optim.factory import OPTIMIZERS, check_options, optimizer_options

    if not section:
        return {}
    name = check_type("optimizer.name", section.get("name"), str)
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name: no optimizer {name!r}; known here: {', '.join(OPTIMIZERS)}")
    types = {"name": str} | optimizer_options(name)
    check_keys(section, types, "optimizer.")
    section = {key: check_type(f"optimizer.{key}", value, types[key]) for key, value in section.items()}
    try:
        check_options(**section)
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error
    return section


def parse_training(section: dict) -> dict:
    """Fields of TrainingArguments; `resume_from_checkpoint: auto` continues the last checkpoint if there is one."""
    from transformers import TrainingArguments

    check_keys(section, [f.name for f in fields(TrainingArguments) if f.init], "training.")
    if not section.get("output_dir"):
        raise ConfigError("training.output_dir: missing; say where the checkpoints and the model go")
    hints = get_type_hints(TrainingArguments) | {"fsdp": bool | str | None}  # annotated as when it was a string
    return {key: check_type(f"training.{key}", value, hints[key]) for key, value in section.items()}


def _apply_override(raw: dict, override: str, sections: Iterable[str]) -> None:
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if section in sections and not dot and text == "null":
        raw.pop(section, None)  # the whole section
        return
    if not (equals and dot and section and key):
        raise ConfigError(f"{override!r} is not an override; write it as training.max_steps=10")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {text!r} is not valid YAML") from error
    check_keys({section: None}, sections)
    if not isinstance(raw.get(section) or {}, dict):
        raise ConfigError(f"{section}: expected a section of keys, got {raw[section]!r}")
    raw[section] = {**(raw.get(section) or {}), key: value}
