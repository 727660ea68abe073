"""Conversations in a model's chat template, with a loss on what the assistant says and on the end of its turn.

A file has one conversation a line: {"messages": [{"role": "user", "content": "..."}, ...]}.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memzoo.training.config import ConfigError
from memzoo.training.data.packing import IGNORED

Messages = list[dict[str, Any]]


def read_conversations(path: str | Path, key: str = "data.path") -> list[Messages]:
    """The conversations of a file of JSON lines, empty lines left out.

    Raises:
        ConfigError: the file is not there or empty, or a line is not a conversation; which one and why.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{key}: {path} is not a file; give JSON lines with `messages`")
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(check_conversation(json.loads(line)))
                except ValueError as error:  # JSONDecodeError is one
                    raise ConfigError(f"{key}: line {number} of {path}: {error}") from error
    if not rows:
        raise ConfigError(f"{key}: {path} holds no conversation; put lines with `messages` in it")
    return rows


def check_conversation(row: Any) -> Messages:
    """The messages of a row. Raises ValueError if it has none or one is not a role with a text."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('no conversation; a line is {"messages": [{"role": "user", "content": "..."}, ...]}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a message needs a `role` and a `content`, both text; got {message!r}")
    return messages


def encode_conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them the assistant writes.

    Templates that mark the assistant's words ({% generation %}) are believed. With others, its words are what a
    conversation up to its turn has more than one that ends where it is asked to speak; white space that the template
    puts after the end of a turn is not among them.
    """
    if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
        marked: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return marked["input_ids"], [bool(said) for said in marked["assistant_masks"]]
    text, spans = assistant_spans(messages, tokenizer)
    out: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # a token that begins before the span is part of the prompt
    said = [any(first <= start < end <= last for first, last in spans) for start, end in out["offset_mapping"]]
    return out["input_ids"], said


def assistant_spans(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the template writes it, and where in it the assistant speaks.

    A turn that the template writes differently once others follow (without its thinking, say) is left out: the model
    would learn to say what it never says.
    """

    def render(part: Messages, opened: bool = False) -> str:
        return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=opened))

    text, spans = render(messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i:
            before = render(messages[:i], opened=True)
            turn = render(messages[: i + 1])
            if turn.startswith(before) and text.startswith(turn):
                spans.append((len(before), len(turn.rstrip())))
    return text, spans


class ChatExamples(Dataset):
    """Encoded conversations: `input_ids` and `labels`, each [T].

    Args:
        max_length: tokens; what is longer is cut at its end.
        key: of the settings, for messages.

    Attributes:
        dropped: conversations in which the assistant says nothing, or nothing within `max_length`.
        cut: conversations that lost their end.

    Raises:
        ConfigError: the tokenizer has no chat template or gives no offsets, the template refuses a conversation, or
            none is left.
    """

    def __init__(
        self,
        conversations: Iterable[Messages],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 1024,
        key: str = "data.path",
    ):
        check_tokenizer(tokenizer, key)
        self.rows: list[dict[str, torch.Tensor]] = []
        self.dropped = self.cut = 0
        for number, messages in enumerate(tqdm(conversations, desc="tokenizing conversations", disable=None), 1):
            try:
                ids, said = encode_conversation(messages, tokenizer)
            except TemplateError as error:
                raise ConfigError(f"{key}: the chat template refuses conversation {number}: {error}") from error
            # the first token of a text is never predicted
            if not any(said[1:max_length]):
                self.dropped += 1
                continue
            self.cut += len(ids) > max_length
            row = torch.tensor(ids[:max_length])
            labels = row.masked_fill(~torch.tensor(said[:max_length]), IGNORED)
            self.rows.append({"input_ids": row, "labels": labels})
        if not self.rows:
            raise ConfigError(
                f"{key}: none of the {self.dropped} conversations has a word of the assistant within "
                f"data.max_length {max_length} tokens; is its role called 'assistant'?"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Refuse a tokenizer without a chat template, or one that does not say where its tokens stand."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{key}: conversations need a chat template, and the tokenizer has none; take a base that was tuned for "
            "chat (its name often ends in -Instruct), or give a Jinja file as base.chat_template"
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{key}: {type(tokenizer).__name__} does not say where in the text its tokens stand, so the assistant's "
            "cannot be found; use a base with a fast tokenizer (one that has a tokenizer.json)"
        )
