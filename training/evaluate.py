"""Bits per byte of a text, read in one go with the memory carried along, or in windows that each start afresh."""

import math
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memzoo.training.data import tokenize


@dataclass
class Score:
    nats: float
    num_tokens: int  # predicted, the end of each document included
    num_bytes: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.num_tokens)


def evaluate_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[bytes], window: int, carry: bool
) -> Score:
    """Every document is read in steps of `window` tokens; with `carry` the cache lives until the document ends."""
    start = time.perf_counter()
    streams = tokenize(documents, tokenizer)
    num_tokens = sum(len(tokens) - 1 for tokens in streams)
    nats = 0.0
    with tqdm(total=num_tokens, unit=" tokens", unit_scale=True) as bar:
        bar.set_description("memory carried" if carry else "windows")
        for tokens in streams:
            nats += document_nats(model, torch.tensor(tokens, device=model.device).long(), window, carry, bar.update)
    return Score(nats, num_tokens, sum(map(len, documents)), time.perf_counter() - start)


@torch.no_grad()
def document_nats(model: PreTrainedModel, tokens: torch.Tensor, window: int, carry: bool, progress=None) -> float:
    """Sum of -log p(token) over tokens [N] after the first."""
    nats, cache = 0.0, None
    for inputs, targets in zip(tokens[:-1].split(window), tokens[1:].split(window)):
        out = model(inputs[None], past_key_values=cache, use_cache=carry)
        cache = out.past_key_values if carry else None
        nats += F.cross_entropy(out.logits[0].float(), targets, reduction="sum").item()
        if progress is not None:
            progress(len(inputs))
    return nats
