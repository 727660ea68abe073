"""Blocks of text files, read and cut while the model trains; nothing but a few pieces of them is in memory.

A block lies within one file. Neighbouring blocks of a file share one token, so every token is predicted exactly once a
pass; the last block of a file may be shorter, and is padded. The files are the shards: `datasets` deals them out to
DataLoader workers and shuffles, torch collects from the workers, and Trainer deals the batches out to the processes.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from memzoo.training.config import ConfigError
from memzoo.training.data.documents import PIECE, Part
from memzoo.training.data.packing import as_block, encode, frame

SAMPLE = 1 << 20  # bytes that the ratio of tokens to bytes is measured on


def cut_parts(
    parts: list[Part], tokenizer: PreTrainedTokenizerBase, block_size: int, piece: int = PIECE
) -> Iterator[dict[str, np.ndarray]]:
    """The blocks of the parts in order, each {"tokens": [T]} with 2 <= T <= block_size."""
    first, last = frame(tokenizer)
    for part in parts:
        tokens = np.array(first, dtype=np.int32)
        for text in itertools.chain(part.pieces(piece), [None]):
            new = encode([text], tokenizer)[0] if text is not None else last
            tokens = np.concatenate([tokens, np.array(new, dtype=np.int32)])
            whole = max(0, (len(tokens) - 1) // (block_size - 1))
            for start in range(0, whole * (block_size - 1), block_size - 1):
                yield {"tokens": tokens[start : start + block_size]}
            tokens = tokens[whole * (block_size - 1) :]
        if len(tokens) > 1:
            yield {"tokens": tokens}


class BlockStream(torch.utils.data.IterableDataset):
    """Passes over the blocks without end; each pass holds every block exactly once, whatever the number of workers.

    It has no end because Trainer, asked to resume a stream, skips batches of one pass only.

    Args:
        shuffle_buffer: the files are shuffled, and each next block is drawn from this many; 0 keeps the order.
        num_workers: processes that read and cut, of which no more than there are files are started.
    """

    def __init__(
        self,
        parts: list[Part],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ):
        sources = {"parts": parts, "tokenizer": tokenizer, "block_size": block_size}
        blocks = IterableDataset.from_generator(cut_parts, gen_kwargs=sources)
        self.blocks = blocks.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else blocks
        self.shuffled, self.num_workers = shuffle_buffer > 0, min(num_workers, len(parts))
        self.block_size, self.bos_token_id = block_size, tokenizer.bos_token_id
        self.num_bytes = sum(map(len, parts))
        self.bits_per_nat = _bits_per_nat(parts, tokenizer)

    def one_pass(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """The blocks of pass `number`, ids and labels."""
        if self.shuffled:
            self.blocks.set_epoch(number)  # which shuffles the files, asked to or not
        loader: DataLoader = DataLoader(self.blocks, batch_size=None, num_workers=self.num_workers, collate_fn=_same)
        for block in loader:
            yield as_block(block["tokens"], self.bos_token_id)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in itertools.count():
            block = None
            for block in self.one_pass(number):
                yield block
            if block is None:
                raise ConfigError("data.path: the files hold nothing to predict; each needs two tokens or more")


def _same(block):
    """Arrays stay arrays: tensors from workers would each take a file descriptor."""
    return block


def _bits_per_nat(parts: list[Part], tokenizer: PreTrainedTokenizerBase) -> float:
    """Turns a mean loss per predicted token into bits per byte, from up to sixteen files' share of SAMPLE bytes."""
    chosen = parts[:: math.ceil(len(parts) / 16)]
    texts = [next(part.pieces(SAMPLE // len(chosen))) for part in chosen]
    ends = len(frame(tokenizer)[1]) * sum(len(text) == len(part) for text, part in zip(texts, chosen))
    return (sum(map(len, encode(texts, tokenizer))) + ends) / sum(map(len, texts)) / math.log(2)
