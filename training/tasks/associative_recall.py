"""Associative recall: pairs of a key and a value, then some of the keys again, each to be answered with its value.

Ba et al. 2016 (arXiv 1610.06258), section 4.1; with several queries per sequence, as in Zoology (Arora et al. 2023,
arXiv 2312.04927). Only the answers carry a loss.

    key value key value ... | filler ... | key ANSWER key ANSWER ...
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedConfig, Trainer, TrainingArguments, set_seed

IGNORED = -100
FILLER = 0


@dataclass(frozen=True)
class RecallTask:
    """Sizes of the task. Token 0 is the filler, then come the keys, then the values.

    Raises:
        ValueError: the sizes contradict each other.
    """

    num_pairs: int = 16
    num_queries: int = 8
    num_keys: int = 64  # to draw from; no key occurs twice in a sequence's pairs or in its queries
    num_values: int = 64
    gap: int = 0  # fillers between the pairs and the queries

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_pairs <= self.num_keys:
            raise ValueError(
                "associative recall needs 1 <= num_queries <= num_pairs <= num_keys (keys are not repeated), got "
                f"num_queries={self.num_queries}, num_pairs={self.num_pairs}, num_keys={self.num_keys}"
            )
        if self.num_values < 2:
            raise ValueError(f"with num_values={self.num_values} there is nothing to recall; use 2 or more")
        if self.gap < 0:
            raise ValueError(f"gap={self.gap} must not be negative")

    @property
    def vocab_size(self) -> int:
        return 1 + self.num_keys + self.num_values

    @property
    def length(self) -> int:
        return 2 * self.num_pairs + self.gap + 2 * self.num_queries

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels, both [size, length]; the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        keys = torch.rand(size, self.num_keys, generator=random).argsort(1)[:, : self.num_pairs] + 1  # [N, P]
        values = torch.randint(self.num_values, (size, self.num_pairs), generator=random) + 1 + self.num_keys
        asked = torch.rand(size, self.num_pairs, generator=random).argsort(1)[:, : self.num_queries]  # [N, Q]
        pairs = torch.stack([keys, values], dim=2).flatten(1)
        queries = torch.stack([keys.gather(1, asked), values.gather(1, asked)], dim=2).flatten(1)
        ids = torch.cat([pairs, torch.full((size, self.gap), FILLER), queries], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -2 * self.num_queries + 1 :: 2] = values.gather(1, asked)
        return ids, labels


class RecallDataset(Dataset):
    """`size` sequences drawn from `seed`."""

    def __init__(self, task: RecallTask, size: int, seed: int) -> None:
        self.input_ids, self.labels = task.sample(size, seed)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def answers(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """The likeliest next token at every position, aligned with the labels: [B, T]."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.cat([labels.new_full((len(labels), 1), IGNORED), logits[:, :-1].argmax(-1)], dim=1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers; nothing else counts."""
    asked = prediction.label_ids != IGNORED
    return {"accuracy": float(np.mean(prediction.predictions[asked] == prediction.label_ids[asked]))}


def train_recall(
    config: PreTrainedConfig, task: RecallTask, seed: int, output_dir: str, eval_size: int = 512, **training
) -> list[tuple[int, float]]:
    """Trains a new model on sequences it sees only once; returns (step, held-out accuracy) at every evaluation.

    `training` goes to TrainingArguments and needs `max_steps`; `config.vocab_size` is set to the task's.
    """
    from transformers import AutoModelForCausalLM

    set_seed(seed)
    config.vocab_size = task.vocab_size
    args = TrainingArguments(
        output_dir,
        seed=seed,
        eval_strategy=training.pop("eval_strategy", "steps"),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        **training,
    )
    trainer = Trainer(
        AutoModelForCausalLM.from_config(config),
        args,
        train_dataset=RecallDataset(task, args.max_steps * args.train_batch_size, seed=2 * seed + 1),
        eval_dataset=RecallDataset(task, eval_size, seed=2 * seed + 2),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=answers,
    )
    trainer.train()
    return [(int(log["step"]), log["eval_accuracy"]) for log in trainer.state.log_history if "eval_accuracy" in log]
