"""Bits per byte on Trainer's evaluation, exact: the nats of every predicted token, over the bytes of the text."""

import math

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction


def sequence_nats(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Sum over each row of -log p(label), [B]; replaces the logits, so that evaluation never gathers them."""
    logits = logits[0] if isinstance(logits, tuple) else logits  # [B, T, V]
    nats = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return nats.view(labels.shape[0], -1).sum(-1)


class BitsPerByte:
    """`compute_metrics` for an evaluation text of `num_bytes` bytes."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        nats = float(np.sum(prediction.predictions, dtype=np.float64))
        return {"bits_per_byte": nats / math.log(2) / self.num_bytes}
