"""What every task shares: its contract, its dataset, and accuracy on the answers only."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

IGNORED = -100


class Task(Protocol):
    """A frozen dataclass of sizes that draws sequences; contradictory sizes are a ValueError when it is made."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def length(self) -> int:
        """Tokens of a sequence, answers included."""

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the possible answers."""

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels, both [size, length]; labels are IGNORED but on the answers. Same seed, same draw."""

    def at_length(self, length: int) -> "Task":
        """The same question in a longer or shorter sequence: the longest one of at most `length` tokens."""

    def solve(self, prefix: list[int]) -> int:
        """The answer that follows `prefix`, found in the prefix alone by search."""


@runtime_checkable
class TextTask(Task, Protocol):
    """A task whose sequences are text, with problems that are kept for the test."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def held_out(self) -> "TextTask":
        """The problems that training never shows."""

    def check_size(self, size: int) -> None:
        """Raises ValueError if there are fewer problems than `size`."""

    def question(self, ids: Tensor, labels: Tensor) -> str:
        """The text of a row [T] up to where its answer begins."""


@runtime_checkable
class DepthTask(Task, Protocol):
    """A task whose answer stands at a place that can be chosen."""

    def at_depth(self, depth: float) -> "DepthTask":
        """With what is asked for at this place: 0 the start of the text, 1 its end."""


class TaskDataset(Dataset):
    """`size` sequences drawn from `seed`, a block at a time: memory does not grow with `size`. Read it in order."""

    BLOCK = 256

    def __init__(self, task: Task, size: int, seed: int) -> None:
        self.task, self.size, self.seed = task, size, seed
        self._block = -1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        block, row = divmod(index, self.BLOCK)
        if block != self._block:
            seed = int(np.random.SeedSequence((self.seed, block)).generate_state(1)[0])
            self._rows = self.task.sample(min(self.BLOCK, self.size - block * self.BLOCK), seed)
            self._block = block
        input_ids, labels = self._rows
        return {"input_ids": input_ids[row], "labels": labels[row]}


def answers(logits: Tensor | tuple, labels: Tensor) -> Tensor:
    """The likeliest next token at every position, aligned with the labels: [B, T]."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.cat([labels.new_full((len(labels), 1), IGNORED), logits[:, :-1].argmax(-1)], dim=1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy`: share of right answer tokens. `exact`: share of sequences with every answer right."""
    asked = prediction.label_ids != IGNORED
    right = prediction.predictions == prediction.label_ids
    return {"accuracy": float(right[asked].mean()), "exact": float((right | ~asked).all(axis=1).mean())}
