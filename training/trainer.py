"""One training run, from its settings to a model folder that AutoModelForCausalLM loads."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from memzoo.training.callbacks import ProgressLines, SampleText
from memzoo.training.checkpoints import check_files, find_checkpoint, record_run
from memzoo.training.config import ConfigError, RunConfig
from memzoo.training.data import PackedBlocks, collate_blocks, load_documents, tokenize
from memzoo.training.metrics import BitsPerByte, sequence_nats
from memzoo.training.plots import plot_loss


class MemzooTrainer(Trainer):
    """Trainer that saves the model's own `use_cache`, not the False that training runs with."""

    def __init__(self, model: PreTrainedModel, *args, **kwargs):
        self.saved_use_cache = model.config.use_cache
        super().__init__(model, *args, **kwargs)

    def _save(self, *args, **kwargs):
        config = self.model.config
        in_training, config.use_cache = config.use_cache, self.saved_use_cache
        try:
            super()._save(*args, **kwargs)
        finally:
            config.use_cache = in_training


def train(config: RunConfig) -> MemzooTrainer:
    """Trains, evaluates and saves model, tokenizer and loss.png into `training.output_dir`; returns the trainer."""
    args = training_arguments(config.training)
    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer, args.seed)
    documents = load_documents(config.data)
    has_eval = bool(documents[1])
    if args.eval_strategy != "no" and not has_eval:
        raise ConfigError("data.eval_fraction: 0 holds nothing out; raise it, or set training.eval_strategy to no")
    resume = find_checkpoint(config)
    args.distributed_state.wait_for_everyone()  # every process has looked before one writes
    if args.should_save:
        record_run(config)
    blocks = {
        name: PackedBlocks(
            tokenize(part, tokenizer, config.data.num_proc, name),
            sum(map(len, part)),
            config.data.block_size,
            tokenizer.bos_token_id,
        )
        for name, part in zip(("training", "evaluation"), documents)
        if part or name == "training"
    }
    train_blocks, eval_blocks = blocks["training"], blocks.get("evaluation")
    trainer = MemzooTrainer(
        model,
        args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=partial(collate_blocks, pad_token_id=_pad_id(tokenizer)),
        compute_metrics=BitsPerByte(eval_blocks.num_bytes) if has_eval else None,
        preprocess_logits_for_metrics=sequence_nats,
    )
    progress = ProgressLines(train_blocks.bits_per_nat)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(progress)
    trainer.add_callback(SampleText(tokenizer, config.sample, partial(_write, progress)))
    if trainer.is_world_process_zero():
        _describe(model, args, train_blocks, eval_blocks)
    trainer.train(resume_from_checkpoint=resume)
    model.config.use_cache = trainer.saved_use_cache
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        out = Path(config.training["output_dir"])
        plot_loss(trainer.state.log_history, train_blocks.bits_per_nat, out / "loss.png", _name(model))
    return trainer


def training_arguments(section: dict) -> TrainingArguments:
    """TrainingArguments with the defaults of a memzoo run; a refused value is a ConfigError."""
    defaults = {
        "include_num_input_tokens_seen": "non_padding",  # logs tokens per second
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if section.get("load_best_model_at_end") or section.get("save_strategy") == "best":
        defaults |= {"metric_for_best_model": "bits_per_byte", "greater_is_better": False}
    section = {key: value for key, value in section.items() if key != "resume_from_checkpoint"}
    try:
        return TrainingArguments(**(defaults | section))
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The named tokenizer, the one beside a pretrained model, or MARU's bytes."""
    name = config.tokenizer.pretrained or config.model.get("pretrained")
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    from memzoo.modeling.maru.tokenization_maru import MaruTokenizer

    return MaruTokenizer()


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A new model with weights drawn from `seed`, or a pretrained one; its vocabulary covers the tokenizer's."""
    section = dict(config.model)
    try:
        if "pretrained" in section:
            folder = section.pop("pretrained")
            if Path(folder).is_dir():
                check_files(folder, "copy it again or train it again")
            model = AutoModelForCausalLM.from_pretrained(folder, **section)
        else:
            model_type, preset = section.pop("model_type"), section.pop("preset", None)
            fields = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
            fields = {"vocab_size": len(tokenizer)} | fields | section
            _check_vocabulary(fields["vocab_size"], tokenizer)
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
    _check_vocabulary(model.config.vocab_size, tokenizer)
    return model


def _check_vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if vocab_size < len(tokenizer):
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is below the {len(tokenizer)} tokens of the tokenizer; "
            "raise it, or leave it out"
        )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def _write(progress: ProgressLines, text: str) -> None:
    """Above the progress bar if there is one."""
    if progress.training_bar is not None:
        progress.training_bar.write(text)
    else:
        print(text)


def _name(model: PreTrainedModel) -> str:
    return f"{model.config.model_type}, {model.num_parameters():,} parameters"


def _describe(
    model: PreTrainedModel, args: TrainingArguments, train_blocks: PackedBlocks, eval_blocks: PackedBlocks | None
) -> None:
    held_out = f", {eval_blocks.num_bytes:,} bytes held out" if eval_blocks is not None else ""
    print(
        f"{_name(model)}; {train_blocks.num_bytes:,} bytes in {len(train_blocks):,} blocks of "
        f"{train_blocks.block_size} tokens{held_out}; to {args.output_dir}",
        file=sys.stderr,
    )
