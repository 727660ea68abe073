"""What an adapter learns from: conversations or plain text."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

from memzoo.training.adapt.chat import ChatExamples, Messages, check_conversation, check_tokenizer, read_conversations
from memzoo.training.adapt.settings import AdaptData
from memzoo.training.config import ConfigError, DataConfig
from memzoo.training.data import PackedBlocks, collate_blocks, load_documents, tokenize
from memzoo.training.data.packing import IGNORED


@dataclass
class Material:
    """Data sets, how they are batched and measured, and what to say about them."""

    train: Dataset
    evaluation: Dataset | None
    collate: Callable
    metrics: Callable | None
    bits_per_nat: float | None  # turns the training loss into bits per byte of a text
    description: str


class Perplexity:
    """`compute_metrics` over all predicted tokens alike, exact; for a text also bits per byte."""

    def __init__(self, data: Dataset):
        examples: Iterable[Any] = (data[i] for i in range(len(data)))  # type: ignore[arg-type]
        self.num_tokens = sum(int((example["labels"][1:] != IGNORED).sum()) for example in examples)
        self.num_bytes = getattr(data, "num_bytes", None)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        nats = float(np.sum(prediction.predictions, dtype=np.float64))
        found = {"perplexity": math.exp(min(nats / self.num_tokens, 700.0))}
        return found if self.num_bytes is None else found | {"bits_per_byte": nats / math.log(2) / self.num_bytes}


def load_material(data: AdaptData, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> Material:
    """Reads, splits and tokenizes. Raises ConfigError where there is nothing to learn or to evaluate on."""
    material = _conversations(data, tokenizer) if data.is_chat else _text(data, tokenizer)
    if args.eval_strategy != "no" and material.evaluation is None:
        raise ConfigError(
            "data.eval_fraction: holds nothing out; raise it, give data.eval_path, or set training.eval_strategy to no"
        )
    return material


def padded(tokenizer: PreTrainedTokenizerBase) -> Callable:
    """The collator: pads are the tokenizer's, and never predicted."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return partial(collate_blocks, pad_token_id=pad)


def _conversations(data: AdaptData, tokenizer: PreTrainedTokenizerBase) -> Material:
    key = "data.path" if data.path else "data.dataset"
    check_tokenizer(tokenizer, key)
    train = read_conversations(data.path) if data.path else _dataset(data)
    if data.eval_path is not None:
        held_out = read_conversations(data.eval_path, "data.eval_path")
    else:
        number = round(len(train) * data.eval_fraction)
        train, held_out = train[: len(train) - number], train[len(train) - number :]
    learned = ChatExamples(train, tokenizer, data.max_length, key)
    measured = ChatExamples(held_out, tokenizer, data.max_length, "data.eval_path") if held_out else None
    parts = [f"{len(learned):,} conversations"]
    parts += [f"{len(measured):,} held out"] if measured is not None else []
    for what, why in (("dropped", "without a word of the assistant"), ("cut", f"cut to {data.max_length} tokens")):
        number = getattr(learned, what) + getattr(measured, what, 0)
        parts += [f"{number:,} {'dropped, ' if what == 'dropped' else ''}{why}"] if number else []
    metrics = Perplexity(measured) if measured is not None else None
    return Material(learned, measured, padded(tokenizer), metrics, None, ", ".join(parts))


def _dataset(data: AdaptData) -> list[Messages]:
    from datasets import load_dataset

    rows = load_dataset(data.dataset, split=data.train_split, **data.dataset_kwargs)
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(check_conversation(row))
        except ValueError as error:
            raise ConfigError(f"data.dataset: row {number} of {data.dataset}: {error}") from error
    if not found:
        raise ConfigError(f"data.dataset: {data.dataset}, split {data.train_split}, holds no conversation")
    return found


def _text(data: AdaptData, tokenizer: PreTrainedTokenizerBase) -> Material:
    source = DataConfig(path=data.path, eval_path=data.eval_path, eval_fraction=data.eval_fraction)
    documents = load_documents(replace(source, block_size=data.max_length))
    blocks = [
        PackedBlocks(
            tokenize(part, tokenizer, what=what), sum(map(len, part)), data.max_length, tokenizer.bos_token_id
        )
        if part
        else None
        for part, what in zip(documents, ("training", "evaluation"))
    ]
    train, held_out = blocks
    if train is None:
        raise ConfigError("data.eval_fraction: holds everything out; lower it")
    description = f"{train.num_bytes:,} bytes in {len(train):,} blocks of up to {data.max_length} tokens"
    if held_out is not None:
        description += f", {held_out.num_bytes:,} bytes held out"
    metrics = Perplexity(held_out) if held_out is not None else None
    return Material(train, held_out, padded(tokenizer), metrics, train.bits_per_nat, description)
