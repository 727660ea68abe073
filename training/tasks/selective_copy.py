"""Selective copy: a stream of tokens with a marker behind each; then the marked ones, in order.

After Gu and Dao 2023 (arXiv 2312.00752), section 4.1.1, where fillers take the place of the unmarked tokens: here only
the marker tells them apart.

    a unmarked b marked c unmarked d marked ... | delimiter | B D ...
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memzoo.training.tasks.common import IGNORED

DELIMITER, UNMARKED, MARKED, FIRST_SYMBOL = 0, 1, 2, 3


@dataclass(frozen=True)
class SelectiveCopyTask:
    """Sizes of the task. Tokens 0, 1, 2 are the delimiter and the two markers, the others are the symbols.

    Raises:
        ValueError: the sizes contradict each other.
    """

    num_tokens: int = 32  # each with its marker
    num_marked: int = 8
    num_symbols: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.num_marked <= self.num_tokens:
            raise ValueError(
                f"selective_copy needs 1 <= num_marked <= num_tokens, got num_marked={self.num_marked}, "
                f"num_tokens={self.num_tokens}"
            )
        if self.num_symbols < 2:
            raise ValueError(f"selective_copy with num_symbols={self.num_symbols} has nothing to tell; use 2 or more")

    @property
    def vocab_size(self) -> int:
        return FIRST_SYMBOL + self.num_symbols

    @property
    def length(self) -> int:
        return 2 * self.num_tokens + 1 + self.num_marked

    @property
    def chance(self) -> float:
        return 1 / self.num_symbols

    def at_length(self, length: int) -> "SelectiveCopyTask":
        if length < 3 * self.num_marked + 1:
            raise ValueError(
                f"selective_copy with num_marked={self.num_marked} takes at least {3 * self.num_marked + 1} tokens, "
                f"not {length}"
            )
        return replace(self, num_tokens=(length - 1 - self.num_marked) // 2)

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        symbols = torch.randint(self.num_symbols, (size, self.num_tokens), generator=random) + FIRST_SYMBOL
        places = torch.rand(symbols.shape, generator=random).argsort(1)[:, : self.num_marked].sort(1).values
        markers = torch.full_like(symbols, UNMARKED).scatter(1, places, MARKED)
        marked = symbols.gather(1, places)
        pairs = torch.stack([symbols, markers], dim=2).flatten(1)
        ids = torch.cat([pairs, torch.full((size, 1), DELIMITER), marked], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -self.num_marked :] = marked
        return ids, labels

    def solve(self, prefix: list[int]) -> int:
        end = prefix.index(DELIMITER)
        marked = [symbol for symbol, marker in zip(prefix[:end:2], prefix[1:end:2]) if marker == MARKED]
        return marked[len(prefix) - end - 1]
