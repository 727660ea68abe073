"""Tokens of documents, cut into blocks that the model sees.

A document is framed by the tokenizer's beginning and end tokens. Neighbouring blocks of a document share one token, so
that under the usual shift by one every token is predicted exactly once. A block lies within one document: memory
begins anew with every row of a batch, so nothing of one document is in it while another is read. The last block of a
document may be shorter, and is padded when batched. Bits per byte is exact: nats of all predictions / ln 2 / bytes of
the text.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training.config import ConfigError
from memzoo.training.data.documents import Part, is_utf8

IGNORED = -100


def tokenize(
    documents: list[bytes], tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None, what: str = "text"
) -> list[np.ndarray]:
    """The ids of every document, framed by bos and eos where the tokenizer has them. Shows a progress bar."""
    from datasets import Dataset as Table
    from datasets import Features, Value

    check_encoding(documents, tokenizer)
    table = Table.from_dict({"content": documents}, features=Features({"content": Value("binary")}))
    table = table.map(
        _tokenize_rows,
        fn_kwargs={"tokenizer": tokenizer},
        batched=True,
        batch_size=16,
        remove_columns="content",
        num_proc=num_proc,
        desc=f"tokenizing {what}",
    )
    return list(table.with_format("numpy")["input_ids"])


def _tokenize_rows(rows: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    first, last = frame(tokenizer)
    return {
        "input_ids": [np.array([*first, *ids, *last], dtype=np.int32) for ids in encode(rows["content"], tokenizer)]
    }


def check_encoding(documents: Iterable[bytes | Part], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses text that the tokenizer cannot read."""
    if not _reads_bytes(tokenizer) and not all(map(is_utf8, documents)):
        raise ConfigError(
            f"data: some text is not UTF-8 and {type(tokenizer).__name__} reads only UTF-8; "
            "re-encode it, or use MARU's bytes (tokenizer.type bytes)"
        )


def encode(contents: list[bytes], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts. A special token's name in a text is read as the characters it has: only frames are special."""
    if _reads_bytes(tokenizer):
        return [tokenizer.encode_bytes(content) for content in contents]
    texts = [content.decode() for content in contents]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, split_special_tokens=True, **options)["input_ids"]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What stands before and after a document: bos and eos, where the tokenizer has them."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [bos] if bos is not None else [], [eos] if eos is not None else []


def as_block(tokens: np.ndarray, bos_token_id: int | None) -> dict[str, torch.Tensor]:
    """Ids and labels of a block; a document's beginning is given, never predicted."""
    ids = torch.from_numpy(tokens.astype(np.int64))  # [T]
    return {"input_ids": ids, "labels": ids if bos_token_id is None else ids.masked_fill(ids == bos_token_id, IGNORED)}


def _reads_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer, MaruTokenizer) and tokenizer.characters is None


class PackedBlocks(Dataset):
    """Blocks of up to `block_size` tokens over tokenized documents, each beginning with the last of the one before.

    Args:
        num_bytes: of the text behind the tokens.
        bos_token_id: frames the documents; it is given, never predicted.
        across: the documents follow each other in one row of blocks, only the last of which is shorter. Without it, a
            block lies within one document.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        num_bytes: int,
        block_size: int,
        bos_token_id: int | None,
        across: bool = False,
    ):
        self.tokens = np.concatenate(documents).astype(np.int32) if documents else np.zeros(0, np.int32)  # [N]
        lengths = np.array([len(self.tokens)] if across else [len(document) for document in documents], np.int64)
        if not (lengths > 1).any() or num_bytes == 0:
            raise ConfigError(f"data: nothing to predict: {len(self.tokens)} token(s), {num_bytes} bytes of text")
        self.num_bytes, self.block_size, self.bos_token_id = num_bytes, block_size, bos_token_id
        counts = -(-np.maximum(lengths - 1, 0) // (block_size - 1))  # blocks of each document
        ends = np.cumsum(lengths)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self.starts = np.repeat(ends - lengths, counts) + within * (block_size - 1)
        self.stops = np.minimum(self.starts + block_size, np.repeat(ends, counts))
        beginnings = np.count_nonzero(self.tokens == bos_token_id) if across else np.count_nonzero(lengths)
        if across and (bos_token_id is None or self.tokens[0] != bos_token_id):
            beginnings += 1  # the very first token is given, whatever it is
        self.num_targets = int(len(self.tokens) - beginnings)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return as_block(self.tokens[self.starts[index] : self.stops[index]], self.bos_token_id)

    @property
    def bits_per_nat(self) -> float:
        """Turns a mean loss per predicted token (nats) into bits per byte of text."""
        return self.num_targets / self.num_bytes / math.log(2)


def collate_blocks(
    blocks: list[dict[str, torch.Tensor]], pad_token_id: int = 0, length: int | None = None
) -> dict[str, torch.Tensor]:
    """A batch [B, T], short blocks padded on the right; there is an attention mask only where there are pads.

    With `length`, every batch is [B, length] and has a mask: batches that Accelerate joins must be alike.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [block["input_ids"] for block in blocks]
    batch = {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad([block["labels"] for block in blocks], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
    }
    if length is not None:
        fill = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
        missing = (0, length - batch["labels"].shape[1])
        return {name: torch.nn.functional.pad(batch[name], missing, value=fill[name]) for name in batch}
    if len({len(row) for row in ids}) == 1:
        del batch["attention_mask"]
    return batch
