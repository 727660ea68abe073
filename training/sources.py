"""What a run learns from: a text in memory, a stream of text files, or a generated task."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, default_data_collator

from memzoo.training.config import ConfigError, RunConfig, SampleConfig
from memzoo.training.data import BlockStream, PackedBlocks, collate_blocks, load_documents, load_parts, tokenize
from memzoo.training.data.bpe import train_bpe
from memzoo.training.data.documents import pieces
from memzoo.training.data.packing import check_encoding
from memzoo.training.metrics import BitsPerByte, sequence_nats
from memzoo.training.tasks import build_task
from memzoo.training.tasks.common import Task, TaskDataset, TextTask, accuracy, answers


@dataclass
class Source:
    """Data sets, how they are batched and measured, and what to say about them."""

    train: Dataset
    evaluation: Dataset | None
    collate: Callable
    metrics: Callable | None
    logits_to_metric: Callable
    bits_per_nat: float | None  # turns the training loss into bits per byte; None where there are no bytes
    description: str


class TextSource:
    """Documents, read before anything is written; then the tokenizer, then blocks.

    Raises:
        ConfigError: there is no text, or none to evaluate on, or a stream without a number of steps.
    """

    defaults: dict[str, Any] = {}  # of TrainingArguments
    best_metric = {"metric_for_best_model": "bits_per_byte", "greater_is_better": False}
    num_tokens = 0  # a text always has a tokenizer, which knows

    def __init__(self, config: RunConfig, args: TrainingArguments):
        self.config, self.args = config, args
        if config.data.streaming and args.max_steps <= 0:
            raise ConfigError("training.max_steps: missing; a stream has no length, so say how many steps to train")
        self.documents: tuple[list[Any], list[bytes]] = (
            load_parts(config.data) if config.data.streaming else load_documents(config.data)
        )
        if args.eval_strategy != "no" and not self.documents[1]:
            raise ConfigError(
                f"data.eval_fraction: {config.data.eval_fraction:g} of this text holds nothing out; raise it, or set "
                "training.eval_strategy to no"
            )

    def tokenizer(self, resume: str | None) -> PreTrainedTokenizerBase:
        """The one of the checkpoint to go on from, the named one, or a BPE that the first process trains and saves."""
        if self.config.tokenizer.type != "bpe":
            return load_tokenizer(self.config)
        if resume is not None:
            return AutoTokenizer.from_pretrained(resume)
        settings, folder = self.config.tokenizer, str(self.args.output_dir)
        with self.args.main_process_first(local=False, desc="training the tokenizer"):
            if self.args.process_index == 0:
                texts = pieces(self.documents[0])
                train_bpe(texts, settings.vocab_size, settings.min_frequency).save_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder)

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> Source:
        assert tokenizer is not None
        data, (train, held_out) = self.config.data, self.documents
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        collate = partial(collate_blocks, pad_token_id=pad)

        def pack(documents: list[bytes], what: str) -> PackedBlocks:
            tokens = tokenize(documents, tokenizer, data.num_proc, what)
            num_bytes = sum(map(len, documents))
            return PackedBlocks(tokens, num_bytes, data.block_size, tokenizer.bos_token_id, data.across_documents)

        blocks: PackedBlocks | BlockStream
        if data.streaming:
            check_encoding(train, tokenizer)
            workers, self.args.dataloader_num_workers = self.args.dataloader_num_workers, 0  # the stream has its own
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            blocks = BlockStream(train, tokenizer, data.block_size, data.shuffle_buffer, seed, workers)
            collate = partial(collate, length=data.block_size)
            size = f"streamed from {len(train)} file(s) in blocks of up to"
        else:
            blocks = pack(train, "training")
            size = f"in {len(blocks):,} blocks of" + ("" if data.across_documents else " up to")
        evaluation = pack(held_out, "evaluation") if held_out else None
        description = f"{blocks.num_bytes:,} bytes {size} {blocks.block_size} tokens"
        if evaluation is not None:
            description += f", {evaluation.num_bytes:,} bytes held out"
        metrics = BitsPerByte(evaluation.num_bytes) if evaluation is not None else None
        return Source(blocks, evaluation, collate, metrics, sequence_nats, blocks.bits_per_nat, description)

    def sample(self) -> SampleConfig:
        return self.config.sample


class TaskSource:
    """Sequences of a generated task: new ones at every step unless `data.task_size` limits them.

    Raises:
        ConfigError: the task's sizes contradict each other, or nothing says how many sequences there are.
    """

    defaults = {"train_sampling_strategy": "sequential"}  # each sequence is random already
    best_metric = {"metric_for_best_model": "exact", "greater_is_better": True}

    def __init__(self, config: RunConfig, args: TrainingArguments):
        self.config, self.args = config, args
        if config.data.task_size is None and args.max_steps <= 0:
            raise ConfigError("training.max_steps: missing; set it, or data.task_size with training.num_train_epochs")
        self.task, self.held_out = load_task(config)
        self.num_tokens = self.task.vocab_size

    def tokenizer(self, resume: str | None) -> PreTrainedTokenizerBase | None:
        return self.task.tokenizer if isinstance(self.task, TextTask) else None

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> Source:
        data, args = self.config.data, self.args
        steps = args.max_steps * args.gradient_accumulation_steps
        size = data.task_size or steps * args.train_batch_size * args.world_size
        seeds = 2 * args.seed + 1, 2 * args.seed + 2
        train = TaskDataset(self.task, size, seeds[0])
        evaluation = TaskDataset(self.held_out, data.task_eval_size, seeds[1])
        description = f"{data.task}, {size:,} sequences of {self.task.length} tokens, {len(evaluation):,} held out"
        return Source(train, evaluation, default_data_collator, accuracy, answers, None, description)

    def sample(self) -> SampleConfig:
        """Held-out problems, answered greedily, unless prompts are given; nothing for a task without text."""
        if not isinstance(self.held_out, TextTask):
            return replace(self.config.sample, prompts=[])
        if self.config.sample != SampleConfig():
            return self.config.sample
        ids, labels = self.held_out.sample(3, self.args.seed)
        prompts = [self.held_out.question(*row) for row in zip(ids, labels)]
        return SampleConfig(prompts, max_new_tokens=self.task.length, temperature=0.0)


def load_task(config: RunConfig) -> tuple[Task, Task]:
    """The task to train on and the one to evaluate on, which are the same where the task has no split of its own."""
    assert config.data.task is not None
    try:
        task = build_task(config.data.task, config.data.task_kwargs)
        if not isinstance(task, TextTask):
            return task, task
        held_out = task.held_out()
        held_out.check_size(config.data.task_eval_size)
        return task, held_out
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"data.task_kwargs: {error}") from error


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The named tokenizer, the one beside a pretrained model, or MARU's bytes."""
    name = config.tokenizer.pretrained or config.model.get("pretrained")
    if name is not None and config.tokenizer.type != "bytes":
        return AutoTokenizer.from_pretrained(name)
    from memzoo.modeling.maru.tokenization_maru import MaruTokenizer

    return MaruTokenizer()
