"""One training run, from its settings to a model folder that AutoModelForCausalLM loads."""

import sys
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)

from memzoo.training.callbacks import MemoryStatistics, ProgressLines, SampleText
from memzoo.training.checkpoints import check_files, find_checkpoint, record_run
from memzoo.training.config import ConfigError, RunConfig
from memzoo.training.consistency import check_schedule
from memzoo.training.memzoo_trainer import MemzooTrainer
from memzoo.training.optim.factory import trainer_optimizer
from memzoo.training.parts import freeze_parts
from memzoo.training.plots import plot_loss
from memzoo.training.profiling import add_meters
from memzoo.training.sharding import check_sharding
from memzoo.training.sources import Source, TaskSource, TextSource

AnyTrainer = TypeVar("AnyTrainer", bound=MemzooTrainer)


def train(config: RunConfig) -> MemzooTrainer:
    """Trains, evaluates and saves model, tokenizer and loss.png into `training.output_dir`; returns the trainer."""
    source_class = source_of(config)
    args = training_arguments(config.training, source_class.defaults, source_class.best_metric)
    source = source_class(config, args)
    resume = find_checkpoint(config)
    args.distributed_state.wait_for_everyone()  # every process has looked before one writes
    trainer, data = build_trainer(MemzooTrainer, config, args, source, resume)
    model, tokenizer = cast(PreTrainedModel, trainer.model), cast(Any, trainer.processing_class)
    if args.should_save:
        record_run(config)
    progress = ProgressLines(data.bits_per_nat)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(progress)
    if config.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(*config.early_stopping.values()))
    trainer.add_callback(SampleText(tokenizer, source.sample(), partial(_write, progress)))
    trainer.add_callback(MemoryStatistics(trainer))
    add_meters(trainer)
    if trainer.is_world_process_zero():
        print(f"{_name(model)}; {data.description}; to {args.output_dir}", file=sys.stderr)
    trainer.run(resume)
    model.config.use_cache = trainer.saved_use_cache
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        out = Path(config.training["output_dir"])
        plot_loss(trainer.state.log_history, data.bits_per_nat, out / "loss.png", _name(model))
    return trainer


def source_of(config: RunConfig) -> type[TaskSource] | type[TextSource]:
    return TaskSource if config.data.task is not None else TextSource


def build_trainer(
    trainer_class: type[AnyTrainer],
    config: RunConfig,
    args: TrainingArguments,
    source: TaskSource | TextSource,
    resume: str | None = None,
) -> tuple[AnyTrainer, Source]:
    """Tokenizer, model, data and optimizer of a run, together; nothing is written but a new BPE."""
    tokenizer = source.tokenizer(resume)
    model = build_model(config, source.num_tokens if tokenizer is None else tokenizer, args.seed)
    freeze_parts(model, config.learning_rates)
    optimizer = trainer_optimizer(config.optimizer, args, model)
    data = source.prepare(tokenizer)
    trainer = trainer_class(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        data_collator=data.collate,
        compute_metrics=data.metrics,
        preprocess_logits_for_metrics=data.logits_to_metric,
        optimizer_cls_and_kwargs=optimizer,
        learning_rates=config.learning_rates,
    )
    return trainer, data


def training_arguments(
    section: dict, defaults: dict | None = None, best_metric: dict | None = None
) -> TrainingArguments:
    """TrainingArguments with the defaults of a memzoo run; a refused value is a ConfigError."""
    defaults = {
        "include_num_input_tokens_seen": "non_padding",  # logs tokens per second
        "dataloader_pin_memory": torch.cuda.is_available(),
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
        **(defaults or {}),
    }
    if section.get("load_best_model_at_end") or section.get("save_strategy") == "best":
        defaults |= best_metric or {}
    section = {key: value for key, value in section.items() if key != "resume_from_checkpoint"}
    try:
        args = TrainingArguments(**(defaults | section))
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error
    check_schedule(args)
    check_sharding(args)
    return args


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase | int, seed: int) -> PreTrainedModel:
    """A new model with weights drawn from `seed`, or a pretrained one; its vocabulary covers the tokenizer's.

    A task whose tokens are not text has no tokenizer, only their number.
    """
    section = dict(config.model)
    num_tokens = tokenizer if isinstance(tokenizer, int) else len(tokenizer)
    try:
        if "pretrained" in section:
            folder = section.pop("pretrained")
            if Path(folder).is_dir():
                check_files(folder, "copy it again or train it again")
            model = AutoModelForCausalLM.from_pretrained(folder, **section)
        else:
            model_type, preset = section.pop("model_type"), section.pop("preset", None)
            names = [f"{name}_token_id" for name in ("pad", "bos", "eos")]
            fields = {name: getattr(tokenizer, name, None) for name in names}
            fields = {"vocab_size": num_tokens} | fields | section
            _check_vocabulary(int(fields["vocab_size"] or 0), num_tokens)
            if preset is None:
                model_config = AutoConfig.for_model(model_type, **fields)
            else:
                config_class: Any = CONFIG_MAPPING[model_type]
                model_config = config_class.from_preset(preset, **fields)
            set_seed(seed)
            model = AutoModelForCausalLM.from_config(model_config)
    except ConfigError:
        raise
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model: {error.__cause__ or error}") from error
    _check_vocabulary(int(model.config.vocab_size or 0), num_tokens)
    return model


def _check_vocabulary(vocab_size: int, num_tokens: int) -> None:
    if vocab_size < num_tokens:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is below the {num_tokens} tokens of the tokenizer; "
            "raise it, or leave it out"
        )


def _write(progress: ProgressLines, text: str) -> None:
    """Above the progress bar if there is one."""
    if progress.training_bar is not None:
        progress.training_bar.write(text)
    else:
        print(text)


def _name(model: PreTrainedModel) -> str:
    return f"{model.config.model_type}, {model.num_parameters():,} parameters"
