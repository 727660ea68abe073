"""Bits per byte of a text, read in one go with the memory carried along, or in windows that each start afresh.

And the answers that a model gives to the problems of a task, by greedy decoding.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memzoo.training.data import tokenize
from memzoo.training.tasks.common import IGNORED, TextTask


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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[bytes],
    window: int,
    carry: bool,
    stride: int | None = None,
) -> Score:
    """Every document is read in steps of `window` tokens; with `carry` the cache lives until the document ends.

    With `stride`, windows overlap: each scores its last `stride` tokens, and the tokens before them are context.
    """
    if stride is not None and (carry or not 1 <= stride <= window):
        raise ValueError(f"stride {stride} goes with windows that start afresh, and is at most their {window} tokens")
    start = time.perf_counter()
    streams = tokenize(documents, tokenizer)
    num_tokens = sum(len(tokens) - 1 for tokens in streams)
    nats = 0.0
    with tqdm(total=num_tokens, unit=" tokens", unit_scale=True) as bar:
        bar.set_description("memory carried" if carry else "windows")
        for tokens in streams:
            ids = torch.tensor(tokens, device=model.device).long()
            if stride is None:
                nats += document_nats(model, ids, window, carry, bar.update)
            else:
                nats += overlapping_nats(model, ids, window, stride, bar.update)
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


@torch.no_grad()
def overlapping_nats(model: PreTrainedModel, tokens: torch.Tensor, window: int, stride: int, progress=None) -> float:
    """The same over windows of which each begins `stride` tokens after the one before and scores what is new."""
    nats = 0.0
    for first in range(0, len(tokens) - 1, stride):
        last = min(first + stride, len(tokens) - 1)
        inputs, targets = tokens[max(0, first + stride - window) : last], tokens[first + 1 : last + 1]
        logits = model(inputs[None], use_cache=False, logits_to_keep=len(targets)).logits[0]
        nats += F.cross_entropy(logits.float(), targets, reduction="sum").item()
        if progress is not None:
            progress(len(targets))
    return nats


@dataclass
class Answer:
    question: str
    written: str
    right: bool  # every token of the answer, and its end


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, task: TextTask, size: int, seed: int, batch_size: int = 128
) -> list[Answer]:
    """What the model writes after each of `size` problems drawn from `seed`; questions are padded to the left."""
    tokenizer, answers = task.tokenizer, []
    ids, labels = task.sample(size, seed)
    for rows, targets in zip(ids.split(batch_size), labels.split(batch_size)):
        asked = [int((target != IGNORED).nonzero()[0]) for target in targets]
        expected = [target[target != IGNORED] for target in targets]
        questions = {"input_ids": [row[:start].tolist() for row, start in zip(rows, asked)]}
        batch = tokenizer.pad(questions, padding_side="left", return_tensors="pt").to(model.device)
        longest = max(map(len, expected))
        out = model.generate(**batch, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = out[:, batch["input_ids"].shape[1] :].cpu()
        for row, target, written, answer in zip(rows, targets, new, expected):
            text = str(tokenizer.decode(written, skip_special_tokens=True))
            right = torch.equal(written[: len(answer)], answer)
            answers.append(Answer(task.question(row, target), text, right))
    return answers
