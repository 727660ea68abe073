"""Copy memory: symbols, a long delay, then the symbols again.

Hochreiter and Schmidhuber 1997; in this form Arjovsky et al. 2015 (arXiv 1511.06464), section 5.1.

    a b c ... | blank blank ... | delimiter | A B C ...
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memzoo.training.tasks.common import IGNORED

BLANK, DELIMITER = 0, 1


@dataclass(frozen=True)
class CopyMemoryTask:
    """Sizes of the task. Token 0 is the blank, 1 the delimiter, the others are the symbols.

    Raises:
        ValueError: the sizes contradict each other.
    """

    vocab_size: int = 10  # blank and delimiter included
    num_items: int = 10  # symbols to remember
    delay: int = 50  # blanks between the symbols and the delimiter
    feed_back: bool = True  # each output is read before the next, as in `generate`; else blanks are read

    def __post_init__(self) -> None:
        if self.vocab_size < 4:
            raise ValueError(
                f"copy_memory with vocab_size={self.vocab_size} has {max(self.vocab_size - 2, 0)} symbol(s) beside "
                "the blank and the delimiter; use 4 or more"
            )
        if self.num_items < 1:
            raise ValueError(f"copy_memory with num_items={self.num_items} has no answer; use 1 or more")
        if self.delay < 0:
            raise ValueError(f"copy_memory: delay={self.delay} must not be negative")

    @property
    def length(self) -> int:
        return 2 * self.num_items + self.delay + 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def at_length(self, length: int) -> "CopyMemoryTask":
        if length < 2 * self.num_items + 1:
            raise ValueError(
                f"copy_memory with num_items={self.num_items} takes at least {2 * self.num_items + 1} tokens, "
                f"not {length}"
            )
        return replace(self, delay=length - 2 * self.num_items - 1)

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        items = torch.randint(2, self.vocab_size, (size, self.num_items), generator=random)
        ids = torch.full((size, self.length), BLANK)
        ids[:, : self.num_items] = items
        ids[:, -self.num_items - 1] = DELIMITER
        labels = torch.full_like(ids, IGNORED)
        labels[:, -self.num_items :] = items
        if self.feed_back:
            ids[:, -self.num_items :] = items
        return ids, labels

    def solve(self, prefix: list[int]) -> int:
        return prefix[len(prefix) - prefix.index(DELIMITER) - 1]
