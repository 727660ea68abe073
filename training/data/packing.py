"""Tokens of all documents in one row, cut into blocks that the model sees.

A document is framed by the tokenizer's beginning and end tokens. Neighbouring blocks share one token, so that under
the usual shift by one every token is predicted exactly once; only the last block may be shorter, and is padded when
batched. Bits per byte is then exact: nats of all predictions / ln 2 / bytes of the text.
"""

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training.config import ConfigError
from memzoo.training.data.documents import is_utf8

IGNORED = -100


def tokenize(
    documents: list[bytes], tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None, what: str = "text"
) -> list[np.ndarray]:
    """The ids of every document, framed by bos and eos where the tokenizer has them. Shows a progress bar."""
    from datasets import Dataset as Table
    from datasets import Features, Value

    reads_bytes = isinstance(tokenizer, MaruTokenizer) and tokenizer.characters is None
    if not reads_bytes and not all(map(is_utf8, documents)):
        raise ConfigError(
            f"data: some text is not UTF-8 and {type(tokenizer).__name__} reads only UTF-8; "
            "re-encode it, or use MARU's byte tokenizer (leave out tokenizer.pretrained)"
        )
    table = Table.from_dict({"content": documents}, features=Features({"content": Value("binary")}))
    table = table.map(
        _tokenize_rows,
        fn_kwargs={"tokenizer": tokenizer, "reads_bytes": reads_bytes},
        batched=True,
        batch_size=16,
        remove_columns="content",
        num_proc=num_proc,
        desc=f"tokenizing {what}",
    )
    return list(table.with_format("numpy")["input_ids"])


def _tokenize_rows(rows: dict, tokenizer: PreTrainedTokenizerBase, reads_bytes: bool) -> dict:
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if reads_bytes:
        encoded = [tokenizer.encode_bytes(content) for content in rows["content"]]
    else:
        texts = [content.decode() for content in rows["content"]]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"input_ids": [np.array([*bos, *ids, *eos], dtype=np.int32) for ids in encoded]}


class PackedBlocks(Dataset):
    """Blocks of `block_size` tokens over tokenized documents, each beginning with the last token of the one before.

    Args:
        num_bytes: of the text behind the tokens.
        bos_token_id: frames the documents; it is given, never predicted.
    """

    def __init__(self, documents: list[np.ndarray], num_bytes: int, block_size: int, bos_token_id: int | None):
        self.tokens = np.concatenate(documents).astype(np.int32) if documents else np.zeros(0, np.int32)  # [N]
        if len(self.tokens) < 2 or num_bytes == 0:
            raise ConfigError(f"data: nothing to predict: {len(self.tokens)} token(s), {num_bytes} bytes of text")
        self.num_bytes, self.block_size, self.bos_token_id = num_bytes, block_size, bos_token_id
        targets = self.tokens[1:]
        self.num_targets = int(np.count_nonzero(targets != bos_token_id)) if bos_token_id is not None else len(targets)

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.block_size - 1))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self.block_size - 1)
        ids = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))  # [T]
        labels = ids if self.bos_token_id is None else ids.masked_fill(ids == self.bos_token_id, IGNORED)
        return {"input_ids": ids, "labels": labels}

    @property
    def bits_per_nat(self) -> float:
        """Turns a mean loss per predicted token (nats) into bits per byte of text."""
        return self.num_targets / self.num_bytes / float(np.log(2))


def collate_blocks(blocks: list[dict[str, torch.Tensor]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch [B, T]; the last block is padded on the right, and only then is there an attention mask."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [block["input_ids"] for block in blocks]
    batch = {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad([block["labels"] for block in blocks], batch_first=True, padding_value=IGNORED),
    }
    if len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return batch
