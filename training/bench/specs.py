"""What the command line names: `NAME key=value ...`, several after each other."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from memzoo.training.config import ConfigError


@dataclass(frozen=True)
class Spec:
    """A task or a model by name, and what differs from its defaults."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={_text(value)}" for key, value in self.overrides.items())])


def parse_specs(words: Iterable[str], what: str) -> list[Spec]:
    """`["llama", "maru", "memory_num_banks=0"]` is two specs. Values are JSON; what is not, is a string.

    Raises:
        ConfigError: a key before any name, a key given twice, or the same spec twice.
    """
    specs: list[Spec] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            specs.append(Spec(word))
        elif not specs:
            raise ConfigError(f"--{what}: {word} comes before any name; write NAME {word}")
        elif key in specs[-1].overrides:
            raise ConfigError(f"--{what} {specs[-1]}: {key} is given twice; keep one of the two")
        else:
            specs[-1].overrides[key] = _value(text)
    names = [str(spec) for spec in specs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--{what}: {', '.join(sorted(twice))} is given twice; keep one of the two")
    return specs


def parse_length(text: str, training_length: int) -> int:
    """`4x` is four times the training length, `512` is 512 tokens. Raises ConfigError."""
    times, is_factor = text.removesuffix("x"), text.endswith("x")
    try:
        length = round(float(times) * training_length) if is_factor else int(times)
    except ValueError as error:
        raise ConfigError(f"--eval-lengths: {text} is not a length; write 512, or 4x the training length") from error
    if length < 2:
        raise ConfigError(f"--eval-lengths: {text} is {length} tokens; use 2 or more")
    return length


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    """As one types it: a string has quotes only where it would be read as something else without them."""
    return value if isinstance(value, str) and _value(value) == value else json.dumps(value)
