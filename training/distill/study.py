"""Texts that a model writes with a document in context, and what it thinks of every next token.

    teacher reads   [start] document [separator] opening continuation
    student reads   [start]                      opening continuation

Openings are short pieces of the document, continuations are sampled. A document longer than the context is read in
windows; an opening is continued with the window that it comes from.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memzoo.training.data.packing import frame

SEPARATOR = "\n\n"
AT_ONCE = 32  # texts that the teacher writes side by side


@dataclass
class Study:
    """n texts of P + L tokens. The teacher's distribution of token t + 1 is in `log_p[:, t]`."""

    ids: Tensor  # [n, S + P + L], `start` included: what the student reads
    log_p: Tensor  # [n, P + L - 1, k] of the k likeliest tokens
    tokens: Tensor  # [n, P + L - 1, k] which they are
    nats: Tensor  # [n, L], the teacher's -log p of the continuation
    num_start: int  # S

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: Any) -> "Study":
        return Study(self.ids[at], self.log_p[at], self.tokens[at], self.nats[at], self.num_start)


def encode_document(document: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids [N], without special tokens.

    Raises:
        ValueError: there is no text in it, or none that the tokenizer knows.
    """
    if not document.strip():
        raise ValueError(f"the document is empty: {len(document)} characters, none of them text; nothing to distil")
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"the tokenizer makes 0 tokens of the document's {len(document)} characters; nothing to distil"
        )
    return torch.tensor(ids, dtype=torch.long)


def split_windows(ids: Tensor, context: int, reserved: int) -> list[Tensor]:
    """The fewest pieces of nearly equal length that leave `reserved` tokens of the context free.

    Raises:
        ValueError: nothing of the document fits.
    """
    room = context - reserved
    if room < 1:
        raise ValueError(
            f"a context of {context} tokens has no room for a document beside {reserved} tokens of opening and "
            "continuation; raise the one or lower the other"
        )
    return list(ids.tensor_split(-(-len(ids) // room)))


class Writer:
    """Lets the teacher write about a document.

    Args:
        context: tokens that it can see at once.
        opening, length: P and L; an opening is shorter where the document or a window of it is.
        top_k: likeliest tokens whose probabilities are kept, None for all.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        opening: int,
        length: int,
        top_k: int | None,
        seed: int,
    ) -> None:
        self.model, self.opening, self.length, self.top_k = model, opening, length, top_k
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        self.start = torch.tensor(frame(tokenizer)[0], dtype=torch.long)
        self.separator = torch.tensor(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"], dtype=torch.long)
        self.reserved = len(self.start) + len(self.separator) + opening + length
        self.context = context

    def write(self, document: Tensor, count: int, held_out: int, progress: Any) -> tuple[Study, Study]:
        """Texts to learn from and texts to measure with, whose openings stand elsewhere as far as there are places."""
        windows = split_windows(document, self.context, self.reserved)
        size = min(self.opening, *map(len, windows), len(document))
        parts: tuple[list[Study], list[Study]] = ([], [])
        for window in windows:
            cache = self._read(window)
            sizes = [-(-n // len(windows)) for n in (held_out, count)]
            openings = self._openings(window, size, sum(sizes)).split(sizes)
            for part, rows in zip(parts[::-1], openings):
                for batch in rows.split(AT_ONCE):
                    part.append(self._continue(deepcopy(cache), batch))
                    progress(len(batch))
        learn, measure = (_join(part) for part in parts)
        return learn, measure

    @torch.no_grad()
    def _read(self, window: Tensor) -> Any:
        """The cache of a model that has read the window."""
        ids = torch.cat([self.start, window, self.separator]).to(self.device)
        return self.model(input_ids=ids[None], use_cache=True, logits_to_keep=1).past_key_values

    def _openings(self, window: Tensor, size: int, count: int) -> Tensor:
        """[count, size] pieces of the window, no two from one place before all places are used."""
        places = len(window) - size + 1
        orders = [torch.randperm(places, generator=self.generator) for _ in range(-(-count // places))]
        return window.unfold(0, size, 1)[torch.cat(orders)[:count]]

    @torch.no_grad()
    def _continue(self, cache: Any, openings: Tensor) -> Study:
        """Sample L tokens after each opening [n, P], from the whole distribution."""
        cache.batch_repeat_interleave(len(openings))
        ids = new = openings.to(self.device)
        kept, nats = [], []
        for _ in range(self.length):
            logits = self.model(input_ids=new, past_key_values=cache, use_cache=True).logits
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # [n, P or 1, V]
            kept.append(log_p.topk(min(self.top_k or log_p.shape[-1], log_p.shape[-1]), -1))
            new = torch.multinomial(log_p[:, -1].exp().cpu(), 1, generator=self.generator).to(self.device)
            nats.append(-log_p[:, -1].gather(1, new))
            ids = torch.cat([ids, new], 1)
        start = self.start.to(self.device).expand(len(ids), -1)
        log_p, tokens = torch.cat([k.values for k in kept], 1), torch.cat([k.indices for k in kept], 1)
        return Study(torch.cat([start, ids], 1), log_p, tokens, torch.cat(nats, 1), start.shape[1])


def _join(parts: list[Study]) -> Study:
    ids, log_p, tokens, nats = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_p", "tokens", "nats")
    )
    return Study(ids, log_p, tokens, nats, parts[0].num_start)
