"""Prioritized replay (arXiv 1511.05952), proportional variant."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6  # so that nothing is never drawn


class Sample(NamedTuple):
    indices: Tensor  # [n], for `update`
    items: list[Any]
    weights: Tensor  # [n], importance weights, the largest of them 1


class PrioritizedReplay:
    """The last `capacity` items, drawn with P(i) = p_i^alpha / sum_k p_k^alpha (equation 1).

    Args:
        capacity: items kept; the oldest gives way.
        alpha: 0 draws uniformly, 1 in proportion to the priorities.

    Raises:
        ValueError: capacity is below 1, or alpha negative.
    """

    def __init__(self, capacity: int, alpha: float = 0.6) -> None:
        if capacity < 1 or alpha < 0:
            raise ValueError(f"capacity {capacity} must be at least 1 and alpha {alpha} at least 0")
        self.capacity, self.alpha = capacity, alpha
        self.items: list[Any] = []
        self.priorities = torch.zeros(capacity, dtype=torch.float64)
        self._next = 0

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Any) -> None:
        """Keep an item, with the largest priority so far: everything is drawn soon after it came."""
        self.priorities[self._next] = self.priorities.max() if self.items else 1.0
        if len(self.items) < self.capacity:
            self.items.append(item)
        else:
            self.items[self._next] = item
        self._next = (self._next + 1) % self.capacity

    def probabilities(self) -> Tensor:
        """P [len]."""
        scaled = self.priorities[: len(self)].pow(self.alpha)
        return scaled / scaled.sum()

    def sample(self, size: int, beta: float, generator: torch.Generator | None = None) -> Sample:
        """Draw with replacement; weights w_i = (len P(i))^-beta over the largest drawn (section 3.4)."""
        if not self.items:
            raise ValueError("there is nothing to replay yet")
        p = self.probabilities()
        indices = torch.multinomial(p, size, replacement=True, generator=generator)
        weights = (len(self) * p[indices]).pow(-beta)
        return Sample(indices, [self.items[i] for i in indices.tolist()], (weights / weights.max()).float())

    def update(self, indices: Tensor, priorities: Tensor) -> None:
        """Set the priorities [n] of items drawn before; negative ones count as 0."""
        self.priorities[indices] = priorities.detach().to("cpu", torch.float64).clamp(min=0) + FLOOR
