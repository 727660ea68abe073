"""Sums, differences and products as text; only the answer carries a loss.

    12+4=16         with reverse_answer 12+4=61, whose first digit needs no carry, and with pad_operands 12+04=16
                    (Lee et al. 2023, arXiv 2307.03381)
    a=12+34;b=a-5;b=41        two steps: later ones go on from the last result, which is never written out

The tokens are MARU's bytes, so a trained model answers `memzoo generate --prompt 12+34=`. Training and test problems
are told apart by a hash of the problem, so that no problem is in both; 12+34 and 34+12 are one problem.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memzoo.modeling.maru.tokenization_maru import MaruTokenizer
from memzoo.training.tasks.common import IGNORED

TOKENIZER = MaruTokenizer()
NAMES = "abcdefghijklmnopqrstuvwxyz"
SMALLEST_SPLIT = 10  # problems
MOST_DIGITS = 18


@dataclass(frozen=True)
class ArithmeticTask:
    """What the problems are made of.

    Raises:
        ValueError: there is no such problem, or too few for a split.
    """

    operations: str = "+"  # of + - *; products bind first, as usual
    digits: int = 2  # of an operand, at most: each is drawn from 0 to 10 ** digits - 1
    num_operands: int = 2
    num_steps: int = 1  # each further step takes the last result and one more operand
    reverse_answer: bool = False  # last digit first; a minus comes last
    pad_operands: bool = False  # with zeros, to `digits` digits, so that equal places stand at equal positions
    test_fraction: float = 0.1
    split: Literal["train", "test"] = "train"

    def __post_init__(self) -> None:
        unknown = set(self.operations) - set("+-*")
        if unknown or not self.operations:
            raise ValueError(f"arithmetic: operations={self.operations!r} must be some of + - *, without spaces")
        if self.digits < 1 or self.num_operands < 2 or not 1 <= self.num_steps <= len(NAMES):
            raise ValueError(
                "arithmetic has no answer without digits >= 1, num_operands >= 2 and num_steps from 1 to "
                f"{len(NAMES)}, got digits={self.digits}, num_operands={self.num_operands}, num_steps={self.num_steps}"
            )
        if self.digits > MOST_DIGITS:
            raise ValueError(f"arithmetic: digits={self.digits} is above {MOST_DIGITS}, as far as numbers are drawn")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"arithmetic: test_fraction={self.test_fraction} must lie between 0 and 1")
        for split in ("train", "test"):
            self._check_size(SMALLEST_SPLIT, split)

    @property
    def tokenizer(self) -> MaruTokenizer:
        return TOKENIZER

    @property
    def vocab_size(self) -> int:
        return len(TOKENIZER)

    @property
    def length(self) -> int:
        return self._length(self.digits)

    @property
    def chance(self) -> float:
        return 0.1

    def check_size(self, size: int) -> None:
        """Raises ValueError if the split has fewer problems than `size`."""
        self._check_size(size, self.split)

    def held_out(self) -> "ArithmeticTask":
        """The problems that training never shows."""
        return replace(self, split="test")

    def at_length(self, length: int) -> "ArithmeticTask":
        """The same with as many digits as fit."""
        fitting = [digits for digits in range(1, MOST_DIGITS + 1) if self._length(digits) <= length]
        if not fitting:
            raise ValueError(f"arithmetic takes at least {self._length(1)} tokens, not {length}")
        return replace(self, digits=fitting[-1])

    def sample(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(seed)
        ids = torch.full((size, self.length), TOKENIZER.pad_token_id)
        labels = torch.full_like(ids, IGNORED)
        for row in range(size):
            question, answer = self._problem(random)
            tokens = [TOKENIZER.bos_token_id, *self._encode(question + "=" + answer), TOKENIZER.eos_token_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            asked = slice(len(tokens) - len(answer) - 1, len(tokens))
            labels[row, asked] = ids[row, asked]
        return ids, labels

    def solve(self, prefix: list[int]) -> int:
        *steps, asked = TOKENIZER.decode(prefix, skip_special_tokens=True).split(";")
        values: dict[str, int] = {}
        for step in steps:
            name, _, expression = step.partition("=")
            values[name] = calculate(expression, values)
        question, _, given = asked.partition("=")
        answer = self._write(calculate(question, values))
        return [*self._encode(answer), TOKENIZER.eos_token_id][len(given)]

    def question(self, ids: Tensor, labels: Tensor) -> str:
        """The text of a row [T] up to where the answer begins."""
        return str(TOKENIZER.decode(ids[: int((labels != IGNORED).nonzero()[0])], skip_special_tokens=True))

    def _length(self, digits: int) -> int:
        """Tokens of the longest problem: beginning, question, answer, end."""
        largest, further, times = 10**digits - 1, self.num_steps - 1, "*" in self.operations
        question = self.num_operands * (digits + 1)  # 12+34=
        result = largest**self.num_operands if times else largest * self.num_operands
        if further:
            question += len("a=;b") + further * (len("b=a+;") + digits)  # a=12+34;b=a+56;b=
            result = result * largest**further if times else result + largest * further
        return 1 + question + len(str(result)) + ("-" in self.operations) + 1

    def _check_size(self, size: int, split: str) -> None:
        operators = self.num_operands + self.num_steps - 2
        problems = 10 ** (self.digits * (operators + 1)) * len(set(self.operations)) ** operators
        if self._commutes:
            problems //= math.factorial(self.num_operands)
        share = int(problems * (self.test_fraction if split == "test" else 1 - self.test_fraction))
        if share < size:
            raise ValueError(
                f"arithmetic with digits={self.digits}, num_operands={self.num_operands} and test_fraction="
                f"{self.test_fraction} has about {share} {split} problems, below the {size} wanted; raise digits, "
                "num_operands or num_steps, change test_fraction, or ask for fewer (data.task_eval_size)"
            )

    @property
    def _commutes(self) -> bool:
        return set(self.operations) in ({"+"}, {"*"}) and self.num_steps == 1

    def _problem(self, random: np.random.Generator) -> tuple[str, str]:
        """Question and answer, drawn until one belongs to the split."""
        count = self.num_operands + self.num_steps - 1
        while True:
            width = self.digits if self.pad_operands else 1
            operands = [f"{value:0{width}}" for value in random.integers(0, 10**self.digits, count)]
            operators = [self.operations[i] for i in random.integers(0, len(self.operations), count - 1)]
            same = sorted(operands) if self._commutes else operands
            digest = hashlib.blake2b(" ".join([*same, *operators]).encode(), digest_size=8).digest()
            is_test = int.from_bytes(digest, "big") < self.test_fraction * 2**64
            if is_test == (self.split == "test"):
                return self._text(operands, operators)

    def _text(self, operands: list[str], operators: list[str]) -> tuple[str, str]:
        first = self.num_operands
        question = operands[0] + "".join(o + v for o, v in zip(operators, operands[1:first]))
        result = calculate(question, {})
        if self.num_steps > 1:
            question = "a=" + question
            for name, later, operator, operand in zip(NAMES, NAMES[1:], operators[first - 1 :], operands[first:]):
                expression = name + operator + operand
                question += f";{later}={expression}"
                result = calculate(expression, {name: result})
            question += ";" + NAMES[self.num_steps - 1]
        return question, self._write(result)

    def _write(self, result: int) -> str:
        return str(result)[::-1] if self.reverse_answer else str(result)

    def _encode(self, text: str) -> list[int]:
        return TOKENIZER.encode_bytes(text.encode())


def calculate(expression: str, values: dict[str, int]) -> int:
    """The value of sums, differences and products of numbers and names."""
    total = 0
    for sign, term in re.findall(r"([+-]?)([^+-]+)", expression):
        product = math.prod(values[factor] if factor in values else int(factor) for factor in term.split("*"))
        total += -product if sign == "-" else product
    return total
