"""One run of `memzoo adapt`: a frozen base, an adapter, Hugging Face's Trainer, a folder with the adapter."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)

from memzoo.adapters.optim import MemoryTrainerMixin
from memzoo.training.adapt.data import Material, load_material
from memzoo.training.adapt.settings import AdaptConfig, BaseConfig
from memzoo.training.callbacks import ProgressLines
from memzoo.training.checkpoints import check_files, find_checkpoint, record_run
from memzoo.training.config import ConfigError
from memzoo.training.memzoo_trainer import MemzooTrainer
from memzoo.training.metrics import sequence_nats
from memzoo.training.profiling import add_meters
from memzoo.training.smollm2 import SMOLLM2, smollm2_folder
from memzoo.training.trainer import training_arguments

BEST = {"metric_for_best_model": "perplexity", "greater_is_better": False}


class AdapterTrainer(MemoryTrainerMixin, MemzooTrainer):
    """Learning rates by part of the adapted model (`memory_lrs`); checkpoints hold the adapter alone."""


def adapt(config: AdaptConfig) -> MemzooTrainer:
    """Trains the adapter, evaluates, and saves it with the tokenizer into `training.output_dir`; returns the trainer.

    Raises:
        ConfigError: a setting that cannot be used, a base that is not there, data that is empty, before any work.
    """
    args = training_arguments(config.training, {}, BEST)
    resume = find_checkpoint(config)
    source = find_base(config.base)
    tokenizer = load_tokenizer(config.base, source)
    data = load_material(config.data, tokenizer, args)
    set_seed(args.seed)
    model = add_adapter(load_base(config.base, source), config)
    trainer = build_trainer(model, args, data, tokenizer, config)
    if args.should_save:
        record_run(config)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ProgressLines(data.bits_per_nat))
    add_meters(trainer)
    if trainer.is_world_process_zero():
        print(f"{describe(model)}; {data.description}; to {args.output_dir}", file=sys.stderr)
    has_trained = trainer.run(resume)
    if data.evaluation is not None and (has_trained or not trainer.is_fsdp_enabled):  # FSDP shards when it trains
        trainer.evaluate()
    model.config.use_cache = trainer.saved_use_cache
    trainer.save_model()
    trainer.save_state()
    return trainer


def build_trainer(
    model: PeftModel, args: Any, data: Material, tokenizer: PreTrainedTokenizerBase, config: AdaptConfig
) -> MemzooTrainer:
    kind: Any = MemzooTrainer
    if config.memory:  # a LoRA alone has one rate, training.learning_rate
        kind = partial(AdapterTrainer, memory_lrs=config.learning_rates)
    return kind(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        data_collator=data.collate,
        compute_metrics=data.metrics,
        preprocess_logits_for_metrics=sequence_nats,
    )


def find_base(base: BaseConfig) -> str:
    """Folder or hub id of a causal language model, its configuration read.

    Raises:
        ConfigError: there is none, or a file of it is damaged.
    """
    name = str(smollm2_folder()) if base.name == SMOLLM2 else base.name
    if Path(name).is_dir():
        check_files(name, "copy it again")
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"base.name: {name} is neither a folder that holds a model nor one on the Hub that can be read ({reason})"
        ) from error
    return name


def load_tokenizer(base: BaseConfig, source: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the chat template of `base.chat_template` if there is one."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base.name: {source} has no tokenizer that can be loaded ({error})") from error
    if base.chat_template is not None:
        if not Path(base.chat_template).is_file():
            raise ConfigError(
                f"base.chat_template: {base.chat_template} is not a file; give one with a Jinja template"
            )
        tokenizer.chat_template = Path(base.chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_base(base: BaseConfig, source: str) -> PreTrainedModel:
    dtype = getattr(torch, base.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if base.quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif base.quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=base.quantization, bnb_4bit_compute_dtype=dtype
        )
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except ImportError as error:  # transformers says it in many words
        if base.quantization is None:
            raise
        raise ConfigError("base.quantization: needs bitsandbytes; pip install 'memzoo[bitsandbytes]'") from error


def add_adapter(model: PreTrainedModel, config: AdaptConfig) -> PeftModel:
    """The base, frozen, with the configured memory, LoRA, or both. Raises ConfigError where they do not fit it."""
    adapter = config.adapter()
    try:
        return get_peft_model(model, adapter)
    except ValueError as error:
        section = "lora" if isinstance(adapter, LoraConfig) else "memory"
        raise ConfigError(f"{section}: {error}") from error


def describe(model: PeftModel) -> str:
    trained, total = model.get_nb_trainable_parameters()
    return f"{model.config.model_type}, {total - trained:,} parameters, and {trained:,} to train"
