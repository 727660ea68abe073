"""Induction: a pattern somewhere in random symbols, its prefix again at the end, its continuation is the answer.

Olsson et al. 2022 (arXiv 2209.11895). The prefix occurs nowhere else, so there is one answer.

    noise ... prefix continuation ... noise | prefix CONTINUATION
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memzoo.training.tasks.common import IGNORED


@dataclass(frozen=True)
class InductionHeadTask:
    """Sizes of the task; every token is a symbol.

    Raises:
        ValueError: the sizes contradict each other.
    """

    length: int = 64
    num_symbols: int = 16
    prefix_length: int = 1  # its symbols differ from each other
    answer_length: int = 1

    def __post_init__(self) -> None:
        if self.prefix_length < 1 or self.answer_length < 1:
            raise ValueError(
                f"induction_head needs prefix_length and answer_length of at least 1, got {self.prefix_length} and "
                f"{self.answer_length}"
            )
        if self.length < 2 * self._pattern:
            raise ValueError(
                f"induction_head: length={self.length} does not hold a pattern of prefix_length={self.prefix_length} "
                f"and answer_length={self.answer_length} twice; that takes {2 * self._pattern} tokens"
            )
        if self.num_symbols < self.prefix_length + 2:
            raise ValueError(
                f"induction_head: num_symbols={self.num_symbols} must be at least prefix_length + 2 = "
                f"{self.prefix_length + 2}, for noise without the prefix and more than one answer"
            )

    @property
    def _pattern(self) -> int:
        return self.prefix_length + self.answer_length

    @property
    def vocab_size(self) -> int:
        return self.num_symbols

    @property
    def chance(self) -> float:
        return 1 / (self.num_symbols - 1)  # the prefix's first symbol does not continue it

    def at_length(self, length: int) -> "InductionHeadTask":
        return replace(self, length=length)

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        k, m, asked = self.prefix_length, self.answer_length, self.length - self._pattern
        symbols = torch.rand(size, self.num_symbols, generator=random).argsort(1)
        prefix, others = symbols[:, :k], symbols[:, k:]
        step = torch.randint(1, self.num_symbols, (size, m), generator=random)
        pattern = torch.cat([prefix, (prefix[:, :1] + step) % self.num_symbols], dim=1)  # [N, k + m]
        start = torch.randint(asked - self._pattern + 1, (size, 1), generator=random)
        places = start + torch.arange(self._pattern)

        ids = torch.randint(self.num_symbols, (size, self.length), generator=random)
        ids = ids.scatter(1, places, pattern)
        ids[:, asked:] = pattern
        # A prefix that noise made by chance begins in noise; its first symbol becomes one that no prefix has.
        again = (ids.unfold(1, k, 1)[:, :asked] == prefix[:, None]).all(-1).scatter(1, start, False)
        substitute = others.gather(1, torch.randint(others.shape[1], (size, asked), generator=random))
        ids[:, :asked] = torch.where(again, substitute, ids[:, :asked])
        labels = torch.full_like(ids, IGNORED)
        labels[:, -m:] = ids[:, -m:]
        return ids, labels

    def solve(self, prefix: list[int]) -> int:
        k, asked = self.prefix_length, self.length - self._pattern
        found = [i for i in range(asked) if prefix[i : i + k] == prefix[asked : asked + k]]
        if len(found) != 1:
            raise ValueError(f"the prefix occurs {len(found)} times before it is asked for")
        return prefix[found[0] + len(prefix) - asked]
