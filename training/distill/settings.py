"""How to distil a document."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Settings:
    """How to distil a document.

    Args:
        train: "bank" alone, or "read": also the projections and routers of the layers that read it.
        continuations, held_out: texts to learn from and to measure with.
        opening, length: tokens of an opening and of its continuation.
        context: tokens that the teacher sees at once; None for the model's limit.
        seed_chapters: start from banks and routers that hold the document's own passages, one a chapter
            (`seeding.py`).
        top_k: probabilities of the teacher that are kept for a token; the others count as one. None for all.
    """

    train: Literal["bank", "read"] = "bank"
    continuations: int = 96
    held_out: int = 32
    opening: int = 8
    length: int = 48
    context: int | None = None
    steps: int = 200
    batch_size: int = 8
    bank_learning_rate: float = 1e-2
    read_learning_rate: float = 1e-3
    top_k: int | None = 64
    seed_chapters: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("continuations", "held_out", "opening", "length", "steps", "batch_size", "context", "top_k")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.held_out == 1:
            raise ValueError("held_out must be at least 2, not 1: how far texts differ says what is chance")
        if self.train not in ("bank", "read"):
            raise ValueError(f"train must be 'bank' or 'read', not {self.train!r}")
