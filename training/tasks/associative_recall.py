"""Associative recall: pairs of a key and a value, then some of the keys again, each to be answered with its value.

Ba et al. 2016 (arXiv 1610.06258), section 4.1; with several queries per sequence, as in Zoology (Arora et al. 2023,
arXiv 2312.04927). Only the answers carry a loss.

    key value key value ... | filler ... | key ANSWER key ANSWER ...
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memzoo.training.tasks.common import IGNORED

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
    gap: int = 1  # fillers between the pairs and the queries; the first one is the delimiter

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

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def at_length(self, length: int) -> "RecallTask":
        shortest = 2 * (self.num_pairs + self.num_queries)
        if length != self.length and self.gap == 0:
            raise ValueError(
                f"recall with gap=0 has {self.length} tokens and cannot have {length}: the filler would be a token "
                "that training never showed; train with gap=1 or more"
            )
        if length < shortest:
            raise ValueError(
                f"recall with num_pairs={self.num_pairs} and num_queries={self.num_queries} takes at least {shortest} "
                f"tokens, not {length}"
            )
        return replace(self, gap=length - shortest)

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
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

    def solve(self, prefix: list[int]) -> int:
        value_of = dict(zip(prefix[: 2 * self.num_pairs : 2], prefix[1 : 2 * self.num_pairs : 2], strict=True))
        return value_of[prefix[-1]]


@dataclass(frozen=True)
class AssociativeRecallTask(RecallTask):
    """The same with a single query."""

    num_queries: int = 1
